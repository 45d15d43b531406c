"""Each turn is learned as it is generated: its prompt is what a model is given, its tokens are what one has to write.

The templates are those of models in use, as TRL brings them, with those of ours for what they lack.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import trl
from chat_templates import CHATML, MISTRAL, QWEN, STATEFUL, make_family_tokenizer
from trl.chat_template_utils import get_training_chat_template

from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import BadExample, ConversationFormat, Example
from megatron_tpt.indexing.example_store import TurnEnds
from megatron_tpt.indexing.tokenizer import Tokenizer

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the <|im_end|> of it",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("hi"), answer("yes"), user("and\n日本?"), answer("no, it is 7")]},
    "system": {"messages": [{"role": "system", "content": "be kind"}, user("hi"), answer("yes")]},
    "inline": {
        "messages": [user("a"), answer("<think>\nhm so\n</think>\n\nb"), user("c"), answer("<think>\nx\n</think>\n\nd")]
    },
    "reasoning": {
        "messages": [user("a"), answer("b", reasoning_content="hm"), user("c"), answer("d", reasoning_content="so")]
    },
    "tools": {
        "tools": TOOLS,
        "messages": [
            user("Weather?"),
            answer("", tool_calls=[call(city="Paris"), call(city='a "b"\n🙂', deep={"list": [1, None, True]})]),
            {"role": "tool", "content": "sunny", "name": "get_weather", "tool_call_id": "abcdefghi"},
            {"role": "tool", "content": "rain", "name": "get_weather", "tool_call_id": "abcdefghi"},
            answer("sunny and rain"),
            user("thanks"),
            answer("you are welcome"),
        ],
    },
}


@pytest.fixture(scope="module")
def tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_family_tokenizer(tmp_path_factory.mktemp("family") / "tokenizer", documents))


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)


MakeFormat = Callable[..., ConversationFormat]


@pytest.fixture(scope="module")
def make_format(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeFormat:
    folder = tmp_path_factory.mktemp("templates")

    def make(template: str, variables: Mapping[str, Any] | None = None, **options: Any) -> ConversationFormat:
        path = folder / "template.jinja"
        path.write_text(template)
        return ConversationFormat(tokenizer, ChatTemplate(tokenizer, path, variables=variables), "messages", **options)

    return make


def published(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text()


def stretches(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(example.has_loss, prepend=False, append=False)).reshape(-1, 2)
    return [(int(begin), int(end)) for begin, end in edges]


def examples_of(format: ConversationFormat, record: Mapping[str, Any]) -> list[Example]:
    (found,) = format.encode_batch([record])
    assert not isinstance(found, BadExample), str(found)
    return found


def unfolded(reference: Any, record: Mapping[str, Any], template: str, **more: Any) -> Any:
    """What transformers makes of messages up to each place, {place: tokens}."""
    messages = record["messages"]
    given = {"tools": record.get("tools"), "chat_template": template, **more}
    return {
        number: reference.apply_chat_template(messages[:number], return_dict=False, **given)
        for number in range(1, len(messages) + 1)
    }


SHOWN = {
    "qwen2_5": ["plain", "system", "inline", "tools"],
    "qwen3": ["plain", "system", "inline", "reasoning", "tools"],
    "qwen3_instruct_2507": ["plain", "system", "tools"],
    "qwen3_5_think": ["plain", "inline", "reasoning", "tools"],
    "qwen3_8": ["plain", "reasoning", "tools"],
    "llama3": ["plain", "system"],
    "gemma3": ["plain", "system"],
    "phi3": ["plain", "system"],
    "cohere": ["plain", "system"],
    "lfm2_v2": ["plain", "tools"],
    "gemma4": ["plain", "tools"],
    "glm4moe": ["plain", "reasoning"],
}
OURS = {
    "chatml": (CHATML, ["plain", "system", "inline"]),
    "qwen": (QWEN, ["plain", "inline"]),
    "stateful": (STATEFUL, ["plain"]),
    "mistral": (MISTRAL, ["plain", "tools"]),
}
CASES = [(name, chat) for name, chats in SHOWN.items() for chat in chats]
CASES += [(name, chat) for name, (_, chats) in OURS.items() for chat in chats]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_every_turn_is_learned_as_it_is_generated(
    name: str, chat: str, make_format: MakeFormat, reference: Any
) -> None:
    record = CHATS[chat]
    if chat == "tools":  # what transformers knows no difference of, our property does: names in texts stay text
        record = json.loads(json.dumps(record).replace("<|im_end|>", "end"))
    template = OURS[name][0] if name in OURS else published(name)
    format = make_format(template)
    fulls = unfolded(reference, record, template)
    prompts = unfolded(reference, record, template, add_generation_prompt=True)
    turns = [number for number, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    found = []
    for example in examples_of(format, record):
        tokens = example.tokens.tolist()
        for begin, end in stretches(example):
            (turn,) = [number for number in turns if prompts[number] == tokens[:begin]]
            assert fulls[turn + 1][:end] == tokens[:end]
            # What follows is blank, or closes the conversation.
            rest = [token for token in fulls[turn + 1][end:] if reference.decode([token]).strip()]
            assert rest in ([], [reference.eos_token_id])
            found.append(turn)
    assert found == turns


def test_turns_share_an_example_where_nothing_is_shown_otherwise_later(make_format: MakeFormat) -> None:
    count = {
        (name, chat): len(examples_of(make_format(published(name)), CHATS[chat]))
        for name, chat in CASES
        if name in SHOWN
    }
    assert count["qwen2_5", "tools"] == count["llama3", "plain"] == count["phi3", "plain"] == 1
    assert count["qwen3", "plain"] == count["qwen3", "reasoning"] == 2
    assert count["qwen3_8", "reasoning"] == 1  # it keeps them


def test_reasoning_that_a_template_shows_in_no_turn_is_what_a_model_writes(
    make_format: MakeFormat, reference: Any, tokenizer: Tokenizer
) -> None:
    template = published("deepseek_r1_distill")
    for chat in ("inline", "reasoning"):
        examples = examples_of(make_format(template), CHATS[chat])
        prompts = unfolded(reference, CHATS[chat], template, add_generation_prompt=True)
        assert [example.tokens[: stretches(example)[0][0]].tolist() for example in examples] == [prompts[1], prompts[3]]
        written = [tokenizer.decode(example.tokens[example.has_loss]) for example in examples]
        first, second = ("hm so", "x") if chat == "inline" else ("hm", "so")
        assert written == [
            f"{first}\n</think>\n\nb<｜end▁of▁sentence｜>",
            f"{second}\n</think>\n\nd<｜end▁of▁sentence｜>",
        ]


WITHOUT_TOOLS = ["llama3", "gemma3", "phi3", "deepseek_r1_distill", "cohere"]
COMPARED = [(name, chat) for name in ["qwen2_5", "qwen3", "lfm2_v2"] for chat in ("plain", "inline", "tools")]
COMPARED += [(name, chat) for name in WITHOUT_TOOLS for chat in ("plain", "inline")]


@pytest.mark.parametrize(("name", "chat"), COMPARED)
def test_masks_are_those_of_trl(
    name: str, chat: str, make_format: MakeFormat, reference: Any, tokenizer: Tokenizer
) -> None:
    """TRL learns the spans of training templates of its own. Given such a template we learn the very same tokens.

    With the published template we learn the same words, with these differences, all of them outside what a model is
    asked to write: TRL also learns the end of the generation prompt (the line break after Qwen2.5's "assistant", all of
    DeepSeek's), the line break after the token that ends a turn, and Phi-3's end of text after its <|end|>. Where a
    template drops earlier reasoning (Qwen3) TRL's keeps it, in one text; we make a text of each turn.
    """
    record = json.loads(json.dumps(CHATS[chat]).replace("<|im_end|>", "end"))
    reference.chat_template = published(name)
    training = get_training_chat_template(reference)
    assert training is not None
    expected = reference.apply_chat_template(
        record["messages"],
        tools=record.get("tools"),
        chat_template=training,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    (example,) = examples_of(make_format(training), record)
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.has_loss.tolist() == [flag == 1 for flag in expected["assistant_masks"]]

    theirs = [tokenizer.decode(example.tokens[begin:end]) for begin, end in stretches(example)]
    if (name, chat) == ("deepseek_r1_distill", "plain"):  # its prompt opens the thinking, which this chat has none of
        assert isinstance(make_format(published(name)).encode_batch([record])[0], BadExample)
        return
    ours = [
        tokenizer.decode(one.tokens[begin:end])
        for one in examples_of(make_format(published(name)), record)
        for begin, end in stretches(one)
    ]
    before = {"qwen2_5": "\n", "deepseek_r1_distill": "<｜Assistant｜><think>\n"}.get(name, "")
    after = {"llama3": "", "cohere": "", "deepseek_r1_distill": ""}.get(name, "\n")
    ends = [after] * (len(ours) - 1) + [after + ("<|endoftext|>" if name == "phi3" else "")]
    assert theirs == [before + text + end for text, end in zip(ours, ends, strict=True)]


def test_special_tokens_are_real_where_the_template_writes_them_and_text_elsewhere(
    make_format: MakeFormat, reference: Any, tokenizer: Tokenizer
) -> None:
    name = "<|im_end|>"
    record = {
        "tools": [{"name": "f", "description": name, "parameters": {name: name}}],
        "messages": [
            user(name),
            answer(
                name,
                reasoning_content=name,
                tool_calls=[{"function": {"name": "f", "arguments": {"x": name, name: 1}}}],
            ),
            {"role": "tool", "content": name, "name": name, "tool_call_id": name},
            answer(name),
        ],
    }
    examples = examples_of(make_format(published("qwen3")), record)
    clean = json.loads(json.dumps(record).replace(name, "plain"))
    end = reference.convert_tokens_to_ids(name)
    for example, expected in zip(examples, examples_of(make_format(published("qwen3")), clean), strict=True):
        assert (example.tokens == end).sum() == (expected.tokens == end).sum()
        assert tokenizer.decode(example.tokens).count(name) > 8
    # Templates may write JSON that escapes all but ASCII.
    escaping = CHATML.replace("message.content +", "(message.content | tojson(ensure_ascii=true)) +")
    (example,) = examples_of(make_format(escaping), {"messages": [user(name), answer("x" + name)]})
    assert (example.tokens == end).sum() == 2
    assert tokenizer.decode(example.tokens[example.has_loss]) == f'"x{name}"{name}'


def test_ends_of_turns_are_reported(tokenizer: Tokenizer, make_format: MakeFormat, reference: Any) -> None:
    special = frozenset(reference.added_tokens_decoder)
    for name, end in (("qwen2_5", "<|im_end|>"), ("gemma3", "<end_of_turn>"), ("phi3", "<|end|>")):
        (example,) = examples_of(make_format(published(name)), CHATS["plain"])
        ends = TurnEnds(special)
        assert ends.add(example) and ends.ids() == [reference.convert_tokens_to_ids(end)]
    example = examples_of(make_format(CHATML.replace("<|im_end|>", "")), CHATS["system"])[0]
    ends = TurnEnds(special)
    assert not ends.add(example) and ends.ids() == []


def test_answer_that_makes_a_token_with_the_prompt_is_refused_in_any_turn(
    make_format: MakeFormat, reference: Any
) -> None:
    assert len(reference.tokenize("ko")) == 1 and len(reference.tokenize("k o")) > 1
    format = make_format(
        CHATML.replace("message.role + '\n'", "message.role + ' k'").replace("assistant\n", "assistant k")
    )
    chat = [user("a"), answer("b"), user("c"), answer(" o"), user("e"), answer("f")]
    assert len(examples_of(format, {"messages": chat})) == 1
    (bad,) = format.encode_batch([{"messages": [*chat[:3], answer("o"), *chat[4:]]}])
    assert isinstance(bad, BadExample) and "one token with the end of the generation prompt" in bad.detail


@pytest.mark.parametrize(
    "template", [CHATML, published("qwen2_5"), published("llama3_1"), published("qwen2_5_training")]
)
def test_time_is_linear_in_turns(template: str, make_format: MakeFormat) -> None:
    """The same words in conversations of 4 and of 320 messages: the time stays about the same."""
    format, words = make_format(template), random.Random(0)

    def seconds(num_messages: int) -> float:
        texts = [" ".join(words.choices(["alpha", "beta", "gamma"], k=12)) for _ in range(320)]
        messages = [(user, answer)[number % 2](text) for number, text in enumerate(texts)]
        records = [{"messages": messages[begin : begin + num_messages]} for begin in range(0, 320, num_messages)]
        begin = time.process_time()
        found = format.encode_batch(records)
        assert sum(len(stretches(example)) for examples in found for example in examples) == 160
        return time.process_time() - begin

    times = {number: min(seconds(number) for _ in range(2)) for number in (4, 320)}
    assert max(times.values()) < 3 * min(times.values()), times


LOOKS_AHEAD = CHATML.replace(
    "message.content +", "message.content + ('!' if message.role == 'assistant' and loop.last else '') +"
)
COUNTS = CHATML.replace("message.content +", "message.content + (messages | length) | string +")
NUMBERS_BACK = CHATML.replace("message.content +", "message.content + loop.revindex | string +")
TWICE = "{% for m in messages %}{{ m.role }}{% endfor %}" + CHATML
BUFFERED = (
    "{% set text %}"
    + CHATML.partition("{% if add")[0]
    + "{% endset %}{{ text }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_MACRO = (
    "{% macro all() %}"
    + CHATML.partition("{% if add")[0]
    + "{% endmacro %}{{ all() }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_ROLE = CHATML.replace("{% if add_generation_prompt %}", "{{ messages[-1].role }}{% if add_generation_prompt %}")
SUMS_UP = "{% set s = namespace(n=0) %}" + CHATML.replace(
    "{% for message in messages %}", "{% for message in messages %}{% set s.n = s.n + 1 %}"
).replace("'<|im_start|>assistant\n'", "(s.n | string) + '<|im_start|>assistant\n'")
SLIDES = CHATML.replace("in messages", "in messages[-3:]")
FILTERED = CHATML.replace("in messages", "in messages if message.content")
JOINED = CHATML.replace("in messages", "in messages + []")
LATE_FIRST = CHATML + "{{ messages[0].content }}"


COUNTED = CHATML.replace("message.role + '\n'", "message.role + (loop.index | string) + '\n'").replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant' + ((messages | length + 1) | string) + '\n'"
)
REMEMBERS = CHATML.replace("message.role + '\n'", "message.role + messages[0].content + '\n'").replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant' + messages[0].content + '\n'"
)
KNOWS_THIRD = CHATML.replace(
    "message.role + '\n'", "message.role + (messages[2].content if loop.index0 > 2 else '') + '\n'"
).replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant' + ((messages[2] or {}).content or '') + '\n'")
FIT = {
    "knows the third": KNOWS_THIRD,
    "looks ahead": LOOKS_AHEAD,
    "buffered": BUFFERED,
    "in a macro": IN_MACRO,
    "filtered": FILTERED,
    "joined": JOINED,
    "counted": COUNTED,
    "remembers": REMEMBERS,
}
UNFIT = {
    "counts": COUNTS,
    "numbers back": NUMBERS_BACK,
    "twice": TWICE,
    "last role": LAST_ROLE,
    "sums up": SUMS_UP,
    "slides": SLIDES,
    "late first": LATE_FIRST,
}


@pytest.mark.parametrize("name", [*FIT, *UNFIT])
def test_templates_that_look_at_other_messages_are_not_believed(
    name: str, make_format: MakeFormat, reference: Any
) -> None:
    template = (FIT | UNFIT)[name]
    record = {"messages": [user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f")]}
    if name in UNFIT:  # no answer follows the prompt that transformers makes
        (bad,) = make_format(template).encode_batch([record])
        assert isinstance(bad, BadExample) and "does not follow the generation prompt" in bad.detail
        return
    prompts = unfolded(reference, record, template, add_generation_prompt=True)
    fulls = unfolded(reference, record, template)
    found = []
    for example in examples_of(make_format(template), record):
        for begin, end in stretches(example):
            (turn,) = [number for number in prompts if prompts[number] == example.tokens[:begin].tolist()]
            assert fulls[turn + 1][:end] == example.tokens[:end].tolist()
            found.append(turn)
    assert found == [1, 3, 5]
