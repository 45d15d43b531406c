from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tpt.errors import UserError
from megatron_tpt.thinking.prompts import (
    EXPERT,
    FOCUS_MARK,
    TEMPLATES,
    Documents,
    Prompt,
    Template,
    can_think,
    load_template,
    render,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("plain")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(folder, chat_template=CHAT_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model that was never taught to think."""
    folder = tmp_path_factory.mktemp("talker")
    make_tokenizer(folder, chat_template=CHAT_TEMPLATE, thinks=False)
    return AutoTokenizer.from_pretrained(folder)


class Filled:
    """A template filled with documents of up to `limit` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, limit: int = 100, **options: str) -> None:
        wants = options.pop("wants", "thinking")
        self.tokenizer = tokenizer
        self.documents = Documents(tokenizer, limit)
        self.prompt = Prompt(Template("test", text, wants), self.documents, tokenizer, **options)  # type: ignore[arg-type]

    def ids(self, document: str, seed: int = 0, **columns: str) -> list[int]:
        return self.prompt.fill(self.documents.first(document)[0], columns, seed)  # type: ignore[return-value]

    def text(self, document: str, seed: int = 0, **columns: str) -> str:
        return self.tokenizer.decode(self.ids(document, seed, **columns))


def test_the_default_prompt_puts_the_document_first_and_is_short() -> None:
    assert EXPERT.text.startswith("{document}\n")
    assert len(EXPERT.text.split()) < 90


def test_a_plain_model_gets_the_template_and_an_open_thinking_block(plain: PreTrainedTokenizerBase) -> None:
    filled = Filled(plain, "Read: {document}")
    assert filled.text("24 people") == "Read: 24 people\n<think>\n"
    assert filled.ids("24 people")[-2] == plain.convert_tokens_to_ids("<think>")


def test_a_template_that_opens_the_thinking_block_stays_as_it_is(plain: PreTrainedTokenizerBase) -> None:
    assert Filled(plain, "{document}<think>\n").text("24 people") == "24 people<think>\n"


def test_a_chat_model_gets_its_own_template(chat: PreTrainedTokenizerBase) -> None:
    filled = Filled(chat, "{document}\nThink.")
    assert filled.text("Copper") == "<|user|>Copper\nThink.<|endoftext|><|assistant|>\n<think>\n"


def test_a_chat_template_that_opens_the_thinking_block_is_not_opened_twice(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template, saved = CHAT_TEMPLATE.replace("assistant|>\n", "assistant|><think>\n"), chat.chat_template
    try:
        assert render(Template("", "{document}"), chat, "<think>")[1] == "<|endoftext|><|assistant|><think>\n"
    finally:
        chat.chat_template = saved


def test_a_model_that_cannot_think_is_asked_to_answer(talker: PreTrainedTokenizerBase) -> None:
    filled = Filled(talker, "{document}\nThink.")
    assert not can_think(talker)
    assert not filled.prompt.opens_thinking
    assert filled.text("Copper") == "<|user|>Copper\nThink.<|endoftext|><|assistant|>\n"
    assert Filled(talker, "{document}", thinking_block="open").text("Copper").endswith("<|assistant|>\n<think>\n")


def test_a_prompt_that_wants_the_answer_opens_no_thinking_block(chat: PreTrainedTokenizerBase) -> None:
    assert can_think(chat)
    assert Filled(chat, "{document}", wants="answer").text("Copper").endswith("<|assistant|>\n")
    chat.chat_template, saved = "{{ messages[0]['content'] }}{{ enable_thinking }}", chat.chat_template
    try:
        assert Filled(chat, "{document}", wants="answer").text("Copper") == "CopperFalse"
        assert Filled(chat, "{document}").text("Copper") == "CopperTrue\n<think>\n"
    finally:
        chat.chat_template = saved


def test_a_chat_template_without_the_message_is_refused(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template, saved = "Hello!", chat.chat_template
    try:
        with pytest.raises(UserError, match="does not show"):
            render(Template("", "{document}"), chat, None)
    finally:
        chat.chat_template = saved


def test_documents_are_cut_at_the_limit_exactly(plain: PreTrainedTokenizerBase) -> None:
    document = "The ferry leaves at nine. " * 50
    ids = plain(document).input_ids
    filled = Filled(plain, "{document}", limit=37)
    assert filled.ids(document)[:37] == ids[:37]
    assert plain.decode(filled.ids(document)[37:]) == "\n<think>\n"
    part, num_tokens = filled.documents.first(document)
    assert num_tokens == len(ids) > 37
    assert part.text == document[: len(part.text)] == plain.decode(ids[:37])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("length", [1, 2048, 5000])
def test_no_prompt_is_longer_than_announced(plain: PreTrainedTokenizerBase, template: Template, length: int) -> None:
    filled = Filled(plain, template.text, 2048)
    assert len(filled.ids("x" * length, question="x" * length, answer="x" * length)) <= filled.prompt.max_tokens


def test_special_tokens_in_a_document_are_only_text(plain: PreTrainedTokenizerBase) -> None:
    filled = Filled(plain, "{document}")
    assert filled.text("a</think><|endoftext|>b") == "a</think><|endoftext|>b\n<think>\n"
    assert plain.convert_tokens_to_ids("</think>") not in filled.ids("a</think><|endoftext|>b")
    assert plain.eos_token_id not in filled.ids("a</think><|endoftext|>b")


def test_braces_in_a_document_are_only_text_and_doubled_ones_in_a_template_too(plain: PreTrainedTokenizerBase) -> None:
    assert Filled(plain, "{document}").text("{document} {x}").startswith("{document} {x}\n")
    assert Filled(plain, "x_{{1}} {document}").text("y").startswith("x_{1} y\n")


def test_a_tokenizer_with_a_begin_token_gets_it_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    make_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|user|>")
    ids = Filled(tokenizer, "{document}").ids("Copper")
    assert ids[0] == 3
    assert ids.count(3) == 1


def test_the_focus_is_somewhere_in_the_document_and_the_same_for_the_same_seed(plain: PreTrainedTokenizerBase) -> None:
    filled = Filled(plain, "{focused_document}")
    document = "Copper conducts heat better than iron does."
    places = set()
    for seed in range(40):
        text = filled.text(document, seed).removesuffix("\n<think>\n")
        before, mark, after = text.partition(FOCUS_MARK)
        assert mark
        assert before + after == document
        assert filled.text(document, seed) == filled.text(document, seed)
        places.add(len(before))
    assert len(places) > 5


def test_columns_stand_where_the_template_has_them(plain: PreTrainedTokenizerBase) -> None:
    filled = Filled(plain, "Q: {question}\nA: {answer}")
    assert filled.text("unused", question="5 + 3?", answer="8") == "Q: 5 + 3?\nA: 8\n<think>\n"


def test_chat_servers_get_the_text_as_a_message() -> None:
    documents = Documents(None, 4)
    prompt = Prompt(Template("", "Read: {document}\nThink {{well}}."), documents, None)
    part, num_tokens = documents.first("The ferry leaves at nine.")
    assert num_tokens == 7  # four characters each
    assert prompt.fill(part, {}, 0) == [{"role": "user", "content": "Read: The ferry leaves\nThink {well}."}]


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=200), limit=st.integers(1, 30))
def test_chunks_are_the_whole_document_and_none_is_too_long(
    plain: PreTrainedTokenizerBase, text: str, limit: int
) -> None:
    chunks = list(Documents(plain, limit).chunks(text))
    assert "".join(part.text for part, _ in chunks) == text
    assert [end for _, end in chunks][-1] == len(text)
    assert all(len(part.ids) <= limit for part, _ in chunks)
    assert [i for part, _ in chunks for i in part.ids] == plain(text, split_special_tokens=True).input_ids


def test_chunks_end_between_words_where_they_can(plain: PreTrainedTokenizerBase) -> None:
    document = "The ferry leaves at nine, and 24 people are waiting on the quay. " * 20
    parts = [part.text for part, _ in Documents(plain, 40).chunks(document)]
    assert len(parts) > 5
    words = document.split()
    assert [word for part in parts for word in part.split()] == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Think about it.", "no placeholder"),
        ("{document} {document}", "2 times"),
        ("", "no placeholder"),
        (None, "cannot be read"),
        ("{document} {qestion}", r"nothing is known of the placeholder \{qestion\}"),
        ("{document} }", "not a template"),
    ],
)
def test_a_template_that_does_not_fit_the_input_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "prompt.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_template(str(path), ["text"])


def test_back_thinking_needs_its_columns() -> None:
    assert load_template("back-thinking", ["question", "answer"]).name == "back-thinking"
    with pytest.raises(UserError, match="--text-column"):
        load_template("back-thinking", ["text"])


def test_arguments_of_the_chat_template_take_effect_or_are_refused(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE + "{{ effort }}{{ enable_thinking }}")
    chat = AutoTokenizer.from_pretrained(tmp_path)
    assert "highTrue" in "".join(render(EXPERT, chat, "<think>", {"effort": "high"}))
    assert "5False" in "".join(render(EXPERT, chat, None, {"effort": 5, "enable_thinking": False}))
    for tokenizer, kwargs, message in (
        (chat, {"eff": 1}, "eff: the model's chat template does not use it"),
        (chat, {"add_generation_prompt": False}, "how the prompt is made"),
        (chat, {"enable_thinking": False}, "--thinking-block none"),
        (plain, {"effort": 1}, "no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            render(EXPERT, tokenizer, "<think>", kwargs)
