"""Chats of every common shape become the same examples; what is not understood is refused by name, never dropped."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from chat_templates import CHATML, DROPS_REASONING, KNOWS_ALL, READS_THINKING, make_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_shapes import ChatColumns
from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import BadExample, ConversationFormat, Example, PairFormat
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
LATER = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALLING = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "call_1", "name": "f"},
    {"role": "assistant", "content": "hi"},
]


@pytest.fixture(scope="module")
def tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer", documents))


MakeFormat = Callable[..., ConversationFormat]


@pytest.fixture(scope="module")
def make_format(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeFormat:
    path = tmp_path_factory.mktemp("templates") / "template.jinja"

    def make(
        template: str = KNOWS_ALL,
        variables: Mapping[str, Any] | None = None,
        columns: ChatColumns | str = "messages",
        **options: Any,
    ) -> ConversationFormat:
        path.write_text(template)
        return ConversationFormat(tokenizer, ChatTemplate(tokenizer, path, variables=variables), columns, **options)

    return make


def shown(tokenizer: Tokenizer, format: ConversationFormat | PairFormat, record: Mapping[str, Any]) -> list[str]:
    """The texts of a record's examples, what is learned between brackets; or what is wrong with it."""
    (found,) = format.encode_batch([record])
    if isinstance(found, BadExample):
        return [str(found)]
    return [bracketed(tokenizer, example) for example in found]


def bracketed(tokenizer: Tokenizer, example: Example) -> str:
    """The text of an example, what is learned between brackets."""
    edges = np.flatnonzero(np.diff(example.has_loss, prepend=False, append=False))
    texts = [tokenizer.decode(part) for part in np.split(example.tokens, edges)]
    return "".join(f"[[{text}]]" if number % 2 else text for number, text in enumerate(texts))


def same(
    record: Mapping[str, Any], expected: Mapping[str, Any], tokenizer: Tokenizer, format: ConversationFormat
) -> None:
    texts = shown(tokenizer, format, expected)
    assert "[[" in texts[0]
    assert shown(tokenizer, format, record) == texts


@pytest.mark.parametrize(
    "record",
    [
        {"messages": json.dumps(HELLO)},
        {"conversations": HELLO},
        {"conversation": json.dumps(HELLO)},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        {"messages": [{"from": "user", "value": "hello"}, {"from": "assistant", "value": "hi"}]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HELLO]},
        {"messages": [{"role": m["role"], "content": [m["content"]]} for m in HELLO]},
        {
            "messages": [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"], "image": None}]} for m in HELLO
            ]
        },
        {"messages": [{**m, "name": None, "tool_calls": [], "reasoning": "", "foreign": None} for m in HELLO]},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": json.dumps(HELLO[:1]), "completion": json.dumps(HELLO[1:])},
        {"instruction": "hello", "input": "", "output": "hi"},
        {"messages": [], "conversations": None, "conversation": HELLO, "prompt": "", "id": None},
        {"messages": HELLO, "tools": None, "chat_template_kwargs": None, "system": None},
        {"messages": HELLO, "tools": "[]", "chat_template_kwargs": "{}", "system": ""},
    ],
)
def test_shapes_of_one_conversation(record: dict[str, Any], make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    same(record, {"messages": HELLO}, tokenizer, make_format())


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]]}, ["q", "r", "a\nb", "c"]),
        ({"messages": HELLO, "system": "kind"}, ["kind", "hello", "hi"]),
        ({"conversations": [{"from": "system", "value": "kind"}, *HELLO], "system": "kind"}, ["kind", "hello", "hi"]),
    ],
)
def test_shapes_with_more_messages(
    record: dict[str, Any], messages: list[str], make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    roles = ["system", "user", "assistant"] if len(messages) % 2 else ["user", "assistant", "user", "assistant"]
    expected = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=True)]
    same(record, {"messages": expected}, tokenizer, make_format())


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION]), [json.dumps(TOOL)]])
@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"name": "f", "arguments": {"x": 1}}],
        json.dumps([CALL]),
    ],
)
def test_tools_and_calls_however_they_are_written(
    tools: Any, calls: Any, make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    format = make_format()
    messages = [CALLING[0], {"role": "assistant", "content": None, "tool_calls": calls}, *CALLING[2:]]
    same({"messages": messages, "tools": tools}, {"messages": CALLING, "tools": [TOOL]}, tokenizer, format)
    (text,) = shown(tokenizer, format, {"messages": CALLING, "tools": [TOOL]})
    assert json.dumps([TOOL]) in text and '[[<call>f:{"x": 1}</call><|im_end|>]]' in text


def test_calls_of_other_shapes(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    expected = {"messages": CALLING}
    old = [
        CALLING[0],
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "7"},
        CALLING[3],
    ]
    same({"messages": old}, expected, tokenizer, make_format())
    sharegpt = [
        {"from": "human", "value": "hello"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "hi"},
    ]
    same({"conversations": sharegpt}, expected, tokenizer, make_format())
    typed = [  # LLaMA-Factory
        {"role": "user", "content": [{"type": "text", "value": "hello"}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
        {"role": "tool", "content": [{"type": "text", "value": "7"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "hi"}]},
    ]
    same({"messages": typed}, expected, tokenizer, make_format())
    twice = [typed[0], CALLING[1] | typed[1], *typed[2:]]
    assert "calls among the parts" in str(make_format().encode_batch([{"messages": twice}])[0])


def test_template_that_joins_arguments_as_text_gets_text(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    joins = KNOWS_ALL.replace("call.function.arguments | tojson", "call.function.arguments + ''")
    same({"messages": CALLING}, {"messages": CALLING}, tokenizer, make_format(joins))
    (text,) = shown(tokenizer, make_format(joins), {"messages": CALLING})
    assert '[[<call>f:{"x": 1}</call><|im_end|>]]' in text
    prints = KNOWS_ALL.replace("call.function.arguments | tojson", "call.function.arguments")
    assert shown(tokenizer, make_format(prints), {"messages": CALLING}) == [text]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", [KNOWS_ALL, READS_THINKING])
def test_reasoning_under_each_of_its_names(
    name: str, template: str, make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    record = {"messages": [HELLO[0], {**HELLO[1], name: "well <|im_end|>"}]}
    (text,) = shown(tokenizer, make_format(template), record)
    assert text.endswith("[[<think>\nwell <|im_end|>\n</think>\n\nhi<|im_end|>]]\n")
    parts = [{"type": "thinking", "thinking": "well <|im_end|>"}, {"type": "text", "text": "hi"}]
    same({"messages": [HELLO[0], {"role": "assistant", "content": parts}]}, record, tokenizer, make_format(template))
    bare, inline = make_format(CHATML), make_format(CHATML, inline_reasoning=True)
    assert f"reads no reasoning, which message 2 has under '{name}'" in shown(tokenizer, bare, record)[0]
    assert shown(tokenizer, inline, record)[0].endswith("[[<think>\nwell <|im_end|>\n</think>\n\nhi<|im_end|>]]\n")


def test_reasoning_in_the_content_goes_where_the_template_looks_for_it(
    make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    inline = [HELLO[0], {"role": "assistant", "content": "<think>\na\n</think>\n\nhi"}]
    later = [LATER[0], {"role": "assistant", "content": "<think>\nb\n</think>\n\nno"}]
    texts = shown(tokenizer, make_format(DROPS_REASONING), {"messages": inline + later})
    first = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [
        f"{first}[[<think>\na\n</think>\n\nhi<|im_end|>]]\n",
        f"{first}hi<|im_end|>\n{second}[[<think>\nb\n</think>\n\nno<|im_end|>]]\n",
    ]


@pytest.mark.parametrize(
    ("marks", "is_learned"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"training": "false"}, False),
        ({"trainable": False}, False),
        ({"loss": False}, False),
        ({"loss_mask": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"learn": False, "weight": 0}, False),
        ({"masked": True}, False),
        ({"masked": False}, True),
        ({"train": None}, True),
    ],
)
def test_messages_marked_as_not_to_be_learned(
    marks: dict[str, Any], is_learned: bool, make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    messages = [HELLO[0], {**HELLO[1], **marks}, *LATER]
    (text,) = shown(tokenizer, make_format(), {"messages": messages})
    assert "hi<|im_end|>" in text and ("[[hi<|im_end|>]]" in text) == is_learned
    assert "[[no<|im_end|>]]" in text
    (alone,) = shown(tokenizer, make_format(), {"messages": messages[:2]})
    assert ("nothing to learn" in alone) != is_learned
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi", **marks}, *LATER]
    assert shown(tokenizer, make_format(), {"conversations": sharegpt}) == [text]


def test_only_the_completion_of_a_prompt_of_several_turns_is_learned(
    make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    for prompt, completion in (("prompt", "completion"), ("chosen_prompt", "answer")):
        record = {prompt: HELLO + LATER[:1], completion: LATER[1:]}
        chats = make_format()
        format = chats if prompt == "prompt" else PairFormat(tokenizer, prompt, completion, chats)
        (text,) = shown(tokenizer, format, record)
        assert "hi<|im_end|>" in text and "[[hi" not in text and "[[no<|im_end|>]]" in text
    (text,) = shown(
        tokenizer, PairFormat(tokenizer, "p", "r", make_format()), {"p": HELLO[:1], "r": HELLO[1:], "system": "s"}
    )
    assert "system\ns<|im_end|>" in text and "[[hi<|im_end|>]]" in text


def test_variables_of_the_template(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n[[hi<|im_end|>]]\n"
    record = {"messages": HELLO}
    assert not shown(tokenizer, make_format(DROPS_REASONING), record)[0].endswith(closed)
    off = make_format(DROPS_REASONING, {"enable_thinking": False})
    assert shown(tokenizer, off, record)[0].endswith(closed)
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        own = record | {"chat_template_kwargs": value}
        assert shown(tokenizer, make_format(DROPS_REASONING), own)[0].endswith(closed)
    on = record | {"chat_template_kwargs": {"enable_thinking": True}}
    assert not shown(tokenizer, off, on)[0].endswith(closed)
    with pytest.raises(UserError, match="'enable_thinking'"):
        make_format(CHATML, {"enable_thinking": False})


def test_developer_is_a_role_of_the_template_or_the_system(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    record = {"messages": [{"role": "developer", "content": "be brief"}, *HELLO]}
    assert shown(tokenizer, make_format(CHATML), record)[0].startswith("<|im_start|>developer\nbe brief")
    for unknown in (
        "{% if m.role == 'developer' %}{{ raise_exception('role') }}{% endif %}",
        "{% if m.role != 'developer' %}",
    ):
        closing = "{% endif %}" if "!=" in unknown else ""
        template = CHATML.replace("message.", "m.").replace(
            "for message in messages %}", "for m in messages %}" + unknown
        )
        format = make_format(template.replace("{% endfor %}", closing + "{% endfor %}"))
        assert shown(tokenizer, format, record)[0].startswith("<|im_start|>system\nbe brief")
        assert any("'developer' is written as 'system'" in note for note in format.take_notes())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "it has nothing"),
        ({"text": "a"}, "it has 'text'"),
        ({"prompt": "a", "completion": "b"}, "--prompt-column prompt"),
        ({"prompt": HELLO, "chosen": HELLO, "rejected": HELLO}, "it has 'prompt', 'chosen', 'rejected'"),
        ({"messages": "hello"}, "a list of messages is missing"),
        ({"messages": [HELLO]}, "message 1 is no object"),
        ({"messages": [*HELLO, {"role": "critic", "content": "a"}]}, "message 3 has role 'critic'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 has role ['user']"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "message 1 is from 'narrator'"),
        ({"messages": [HELLO[0], {**HELLO[1], "tone": "kind"}]}, "message 2 has a field 'tone'"),
        ({"messages": [{**HELLO[0], "id": 0}, HELLO[1]]}, "message 1 has a field 'id'"),
        ({"messages": [HELLO[0], {**HELLO[1], "training_detail": [{"train": False}]}]}, "'training_detail'"),
        ({"messages": [HELLO[0], {**HELLO[1], "weight": 0.5}]}, "'weight' of message 2 is 0.5"),
        ({"messages": [HELLO[0], {**HELLO[1], "weight": 1, "train": False}]}, "weight and train contradict"),
        ({"messages": [HELLO[0], {**HELLO[1], "reasoning": "a", "thinking": "b"}]}, "different texts"),
        ({"messages": [{**HELLO[0], "reasoning": "a"}, HELLO[1]]}, "message 1 has reasoning"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "bold": 1}]}]}, "'bold'"),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "content of message 1 is dict"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": None}]}, "content of message 2 is missing"),
        ({"messages": HELLO, "tools": "nothing"}, "tools is text that is not JSON"),
        ({"messages": HELLO, "tools": {"f": 1}}, "tools is dict, not a list"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "of type 'web_search'"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, "no function with a name"),
        ({"messages": [{**HELLO[0], "tool_calls": [CALL]}, HELLO[1]]}, "message 1 has tool calls"),
        ({"messages": [HELLO[0], {**HELLO[1], "tool_calls": {"f": 1}}]}, "tool_calls of message 2 is dict"),
        ({"messages": [HELLO[0], {**HELLO[1], "tool_calls": [{"type": "custom"}]}]}, "of type 'custom'"),
        ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "must not give 'messages'"),
        ({"messages": HELLO, "chat_template_kwargs": {"effort": 1}}, "reads no variable 'effort'"),
        ({"messages": HELLO, "chat_template_kwargs": 7}, "chat_template_kwargs is int"),
        ({"messages": [{"role": "system", "content": "a"}, *HELLO], "system": "b"}, "both give one"),
        (
            {"messages": [HELLO[0], {**HELLO[1], "tool_calls": [{"function": {"name": "\ufdd0", "arguments": {}}}]}]},
            "no character",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    record: dict[str, Any], words: str, make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    (text,) = shown(tokenizer, make_format(), record)
    assert words in text and "[[" not in text


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        (CHATML, {"messages": HELLO, "tools": [TOOL]}, "reads no tools"),
        (CHATML, {"messages": CALLING}, "reads no 'tool_calls', which message 2 has"),
        (
            KNOWS_ALL.replace("{{ call.function.name }}", "{{ 'it' }}"),
            {"messages": CALLING},
            "a tool call of message 2",
        ),
        (
            KNOWS_ALL.replace("call.function.arguments | tojson", "'{}'"),
            {"messages": CALLING},
            "a tool call of message 2",
        ),
        (KNOWS_ALL.replace("{{ tools | tojson }}", ""), {"messages": HELLO, "tools": [TOOL]}, "omits tools"),
        (
            CHATML.replace("for message in messages", "for message in messages if message.role != 'system'"),
            {"messages": [{"role": "system", "content": "be kind"}, *HELLO]},
            "says, whose role is 'system'",
        ),
        (CHATML.replace("in messages", "in messages[-2:]"), {"messages": HELLO + LATER}, ""),
        ("{{ 1 / 0 }}", {"messages": HELLO}, "division by zero"),
        ("{{ messages.nothing.at.all }}", {"messages": HELLO}, "no attribute 'nothing'"),
        ("{% for i in range(10**9) %}{% endfor %}", {"messages": HELLO}, "Range too big"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, {"messages": HELLO}, "unsafe"),
    ],
)
def test_what_a_template_does_not_show_is_refused_by_name(
    template: str, record: dict[str, Any], words: str, make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    (found,) = make_format(template).encode_batch([record])
    if words:
        assert isinstance(found, BadExample) and words in str(found)


def test_template_without_end_is_stopped(make_format: MakeFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tpt.indexing.chat_limits.MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="no end"):
        make_format(endless).encode_batch([{"messages": HELLO}])
    monkeypatch.setattr("megatron_tpt.indexing.chat_limits.MAX_CHARACTERS", 1000)
    with pytest.raises(UserError, match="no end"):
        make_format(CHATML + "{% for a in range(2000) %}a{% endfor %}").encode_batch([{"messages": HELLO}])


def test_what_has_no_effect_is_noted(make_format: MakeFormat) -> None:
    format = make_format()
    record = {
        "messages": [{**HELLO[0], "weight": 1}, {**HELLO[1], "content": "it is <|im_end|>"}],
        "id": 7,
        "source": "x",
    }
    format.encode_batch([record, record])
    assert format.take_notes() == {
        "column 'id' is not read": 2,
        "column 'source' is not read": 2,
        "user messages marked to be learned, which only assistant messages are": 2,
        "the special token '<|im_end|>' in the content of an assistant message is text": 2,
    }
    assert not format.take_notes()
    assert format.choose_columns(["id", "tools", "conversations"]) == ("conversations", "tools")
    assert format.take_notes() == {"column 'id' is not read": 1}
    with pytest.raises(UserError, match="no column 'messages'; its columns are id, tools"):
        format.choose_columns(["id", "tools"])


def test_fields_and_columns_can_be_named(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    columns = ChatColumns("chat", "functions", ignored_fields=frozenset({"id", "tone"}))
    format = make_format(columns=columns)
    record = {"chat": [{**m, "id": 1, "tone": "kind"} for m in HELLO], "functions": [TOOL], "messages": LATER}
    assert shown(tokenizer, format, record) == shown(tokenizer, make_format(), {"messages": HELLO, "tools": [TOOL]})
    assert "a list of messages is missing in 'chat'" in shown(tokenizer, format, {"messages": HELLO})[0]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(0, 1)
    | st.text("a<|im_end|>é\ud800\ufdd0 ", max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "arguments"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["content", "value", "from", "reasoning", "tool_calls", "weight", "name", "function_call", "tone"]


def pack(tokenizer: Tokenizer, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    """The examples of a packed index, decoded, what is learned between brackets."""
    (folder / "template.jinja").write_text(KNOWS_ALL)
    chosen = {"chat_template": folder / "template.jinja", "sequence_length": 400} | options
    for kind in ("jsonl", "parquet"):
        path = folder / f"chats.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        pack_sft(PackOptions(input=[path], tokenizer=tokenizer.folder, output=folder / kind, **chosen))
    lines, table = (
        [bracketed(tokenizer, example) for row in range(len(index)) for example in index[row]]
        for index in (PackedIndex(folder / "jsonl"), PackedIndex(folder / "parquet"))
    )
    assert lines == table
    return lines


def test_packing_reads_lines_and_tables_alike_and_names_what_it_does_not_read(
    tokenizer: Tokenizer, make_format: MakeFormat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = json.dumps([CALL])
    rows = [
        {"messages": [HELLO[0], {**HELLO[1], "weight": 0}, *LATER], "tools": None, "id": "a"},
        {
            "messages": [CALLING[0], {"role": "assistant", "content": None, "tool_calls": calls}, CALLING[2]],
            "tools": json.dumps([TOOL]),
            "id": "b",
        },
    ]
    texts = pack(tokenizer, tmp_path, rows)
    assert sorted(texts) == sorted(text for row in rows for text in shown(tokenizer, make_format(), row))
    assert "note: column 'id' is not read" in capsys.readouterr().err
    row = {"talk": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi", "tone": "x"}]}
    with pytest.raises(UserError, match=r"chats.jsonl:1: unknown field 'tone'"):
        (tmp_path / "chats.jsonl").write_text(json.dumps(row))
        options = {"input": [tmp_path / "chats.jsonl"], "tokenizer": tokenizer.folder, "sequence_length": 99}
        pack_sft(PackOptions(**options, output=tmp_path / "refused", messages_column="talk"))


PAIR = {"prompt_column": "p", "response_column": "r"}
ONE_TURN = {"p": HELLO[:1], "r": HELLO[1:]}


@pytest.mark.parametrize("own_template", [None, "of a file"])
@pytest.mark.parametrize("row", [ONE_TURN, {name: json.dumps(value) for name, value in ONE_TURN.items()}])
def test_packing_prompts_and_responses_of_messages(
    row: Any, own_template: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = {} if own_template else {"chat_template": None}
    (text,) = pack(tokenizer, tmp_path, [row], **PAIR, **options)
    assert text.endswith("<|im_start|>assistant\n[[hi<|im_end|>]]\n")
    manifest = PackManifest.read(tmp_path / "jsonl")
    assert [tokenizer.decode([id]) for id in manifest.end_of_turn_ids] == ["<|im_end|>"]
    assert manifest.settings.chat_template is not None


@pytest.mark.parametrize("response", ["hi", "[1, 2]", "[]", '["role"]', '{"role": "assistant", "content": "hi"}'])
def test_packing_prompts_and_responses_of_text(
    response: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"p": "hello", "r": response, "system": "be kind", "tools": None}
    (text,) = pack(tokenizer, tmp_path, [row], **PAIR, chat_template=None)
    assert text == f"hello[[{response}<|endoftext|>]]"
    assert capsys.readouterr().err.count("note: column 'system' is not read (1)") == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "--chat-template"),
        ({"chat_template": None, "inline_reasoning": True}, "--inline-reasoning"),
        ({"chat_template": None, "ignore_fields": ["id"], "tools_column": "t"}, "--tools-column, --ignore-fields"),
    ],
)
def test_options_without_effect_on_texts_are_refused(
    options: dict[str, Any], named: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"no chat template is applied: omit {named}[)]"):
        pack(tokenizer, tmp_path, [{"p": "hello", "r": "hi"}], **PAIR, **options)


def test_what_keeps_prompts_and_responses_from_being_conversations_is_said(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer.folder, bare := tmp_path / "bare")
    settings_path = bare / "tokenizer_config.json"
    content = json.loads(settings_path.read_text())
    settings_path.write_text(json.dumps({name: value for name, value in content.items() if name != "chat_template"}))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"messages, not texts .*has no chat template.*--chat-template"):
        pack(Tokenizer(bare), tmp_path, [ONE_TURN], **PAIR, chat_template=None)


def test_what_a_template_does_not_read_of_messages_is_noted(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    format = make_format(CHATML, columns=ChatColumns(tools="functions"))
    named = [{**HELLO[0], "name": "Ann"}, HELLO[1]]
    assert "hi" in shown(tokenizer, format, {"messages": named})[0]
    assert format.take_notes() == {
        "the chat template does not read 'name' of messages": 1,
        "no tools in column 'functions'": 1,
    }


def test_text_parts_are_joined_for_templates_that_read_none(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    format = make_format(CHATML)
    (text,) = shown(tokenizer, format, record)
    assert "user\none\ntwo<|im_end|>" in text and "[[one\ntwo<|im_end|>]]" in text
    (note,) = format.take_notes()
    assert note.startswith("text parts of a content are joined")


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": HELLO[1:]}, {"prompt": HELLO[:1], "completion": "a"}])
def test_a_text_beside_messages_is_refused_for_what_it_is(
    row: dict[str, Any], make_format: MakeFormat, tokenizer: Tokenizer
) -> None:
    for format in (make_format(), PairFormat(tokenizer, "prompt", "completion", make_format())):
        assert "one is text and the other messages" in shown(tokenizer, format, row)[0]


def test_a_bare_tool_keeps_its_empty_fields(make_format: MakeFormat, tokenizer: Tokenizer) -> None:
    bare = {"name": "f", "description": "", "parameters": {}}
    texts = [
        shown(tokenizer, make_format(), {"messages": HELLO, "tools": [tool]})
        for tool in (bare, {"type": "function", **bare}, {"type": "function", "function": bare})
    ]
    assert texts[0] == texts[1] == texts[2] and '"parameters": {}' in texts[0][0]


one_odd_field = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=1)
random_messages = st.lists(
    st.builds(
        lambda role, fields: {"role": role, "content": "a", **fields},
        st.sampled_from(["user", "assistant", "assistant", "tool"]),
        one_odd_field,
    )
    | json_values.filter(lambda value: value is not None),
    max_size=4,
)
COLUMNS = ["messages", "conversations", "tools", "chat_template_kwargs", "system", "prompt", "completion", "output"]
random_records = st.builds(
    lambda messages, columns: {"messages": messages, **columns},
    random_messages,
    st.dictionaries(st.sampled_from(COLUMNS), json_values | random_messages, max_size=1),
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(random_records, min_size=1, max_size=4))
def test_no_record_breaks_the_reader(records: list[dict[str, Any]], make_format: MakeFormat) -> None:
    found = make_format().encode_batch(records)
    assert len(found) == len(records)
    for examples in found:
        assert isinstance(examples, BadExample) or all(isinstance(e, Example) and e.has_loss.any() for e in examples)
