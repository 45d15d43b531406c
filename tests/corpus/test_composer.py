"""What columns and conversations become: text, question, answer and thoughts, with nothing lost."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer

from megatron_tpt.corpus.annotate.lengths import Lengths
from megatron_tpt.corpus.curate_options import Dataset
from megatron_tpt.corpus.documents import Composer, Document
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.records import Columns, Record
from megatron_tpt.records.parsing import parse_row
from megatron_tpt.records.record import BadRecord


def document(fields: dict[str, Any], *names: str, **options: Any) -> tuple[Record, Document]:
    record = parse_row(fields, Columns(",".join(names), compose=Composer(**options), extra=("tools", "system")))
    return record, Document.of(record)


def test_thoughts_of_a_column_of_their_own_begin_the_answer() -> None:
    dataset = Dataset("a", "a.jsonl", ("q", "trace+solution"))
    assert dataset.has_thoughts and dataset.column_names == ("q", "trace", "solution")
    names = dataset.column_names
    record, found = document({"q": "Why?", "trace": "Hm.", "solution": "So."}, *names, has_thoughts=True)
    assert record.text == "Why?\n<think>Hm.</think>\nSo." and record.thinking is None
    assert (found.question, found.answer, found.thoughts) == ("Why?", "<think>Hm.</think>\nSo.", "Hm.")
    record, _ = document({"q": "Why?", "trace": None, "solution": "So."}, *names, has_thoughts=True)
    assert record.text == "Why?\nSo."
    record, _ = document({"q": "Why?", "thinking": "Hm.", "a": "So."}, "q", "thinking", "a", has_thoughts=True)
    assert record.text == "Why?\n<think>Hm.</think>\nSo." and record.thinking is None  # not twice


@pytest.mark.parametrize(
    ("answer", "thoughts"),
    [
        ("<think>a b</think>c<think>d</think>", "a b\nd"),
        ("a b</think>c", "a b"),  # the prompt ended with the first tag
        ("a b</think>c<think>d</think>", "a b\nd"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "a"),
        ("<think>never ends", "never ends"),
        ("none", ""),
    ],
)
def test_thoughts_are_what_is_between_the_tags(answer: str, thoughts: str) -> None:
    assert document({"q": "?", "a": answer}, "q", "a")[1].thoughts == thoughts


def test_lengths_count_thinking_in_a_field_of_its_own(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    question, answer, thinking = "What is it?", "It is <think>a</think> that.", "Let me think about it."
    sizes = {text: len(tokenizer.encode(text)) for text in (question, answer, thinking, "a")}
    with_answer = document({"q": question, "a": answer, "thinking": thinking}, "q", "a")[1]
    without = document({"q": question, "thinking": thinking}, "q")[1]
    assert Lengths(tmp_path).annotate([with_answer, without]) == [
        {
            "tokens": sizes[question] + sizes[answer] + sizes[thinking],
            "answer_tokens": sizes[answer] + sizes[thinking],
            "thinking_tokens": sizes["a"] + sizes[thinking],
        },
        {"tokens": sizes[question] + sizes[thinking], "answer_tokens": None, "thinking_tokens": sizes[thinking]},
    ]


def test_a_conversation_keeps_what_belongs_to_it_in_other_columns() -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    tools = [{"name": "look", "parameters": {}}]
    fields = {"chat": chat, "system": "Be brief.", "tools": tools, "meta": {"score": 3}}
    record, found = document(fields, "chat")
    assert record.text == "Be brief.\nHi\nHo" and (found.question, found.answer) == ("Be brief.\nHi", "Ho")
    assert record.meta == {"score": 3, "messages": chat, "system": "Be brief.", "tools": tools, "answer_begin": 13}
    assert document({"text": "A text.", "system": "no chat"}, "text")[0].meta == {}
    odd = [{"role": "user", "content": "Hi", "at": 5}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(BadRecord, match="unknown field 'at'"):
        document({"chat": odd}, "chat")
    assert document({"chat": odd}, "chat", ignored_fields=frozenset({"at"}))[0].text == "Hi\nHo"


@pytest.mark.parametrize("begin", [True, -1, 100, "3", None])
def test_a_foreign_field_is_not_taken_for_the_place_of_an_answer(begin: Any) -> None:
    found = Document.of(Record("a", "some text", None, {"answer_begin": begin}))
    assert not found.has_answer and found.text == "some text"


@pytest.mark.parametrize(
    ("fields", "names", "problem"),
    [
        ({"q": "?", "a": None}, ("q", "a"), "no text"),
        ({"q": "?", "a": " "}, ("q", "a"), "empty answer"),
        ({"q": "?", "a": 3}, ("q", "a"), "column 'a' is not a string"),
        ({"chat": []}, ("chat",), "no text"),
        ({"chat": 3}, ("chat",), "no text"),
        ({"chat": [{"role": "user", "content": "Hi"}], "tools": "{broken"}, ("chat",), "not JSON"),
    ],
)
def test_what_is_no_document_is_named(fields: dict[str, Any], names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(BadRecord) as caught:
        document(fields, *names)
    assert caught.value.problem == problem
