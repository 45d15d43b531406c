"""What is learned of a chat against TRL's trainer, on the shapes of eight published templates.

The templates are our own. Between MARKS is what a model writes: TRL's trainer gets them as `{% generation %}`
spans, tools/pack_sft.py gets the template without any and has to find the same tokens on its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from chat_templates import make_family_tokenizer

from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import BadExample, ConversationFormat, Example
from megatron_tpt.indexing.tokenizer import Tokenizer

MARKS = ("⟦", "⟧")
_CALLS = (
    "{% for call in message.tool_calls or [] %}{{ '\n' if message.content or not loop.first }}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
_RESULTS = (
    "{{ '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{{ '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"
)
_CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SHAPES = {
    # A system message by default, the tools in it; results of tools share one turn of the user.
    "qwen2_5": "{% set first = messages[0] %}{{ '<|im_start|>system\n' }}"
    "{{ first.content if first.role == 'system' else 'You help.' }}"
    "{% if tools %}{{ '\n# Tools\n' + (tools | tojson) }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "⟦{{ message.content or '' }}" + _CALLS + "{{ '<|im_end|>' }}⟧{{ '\n' }}"
    "{% elif message.role == 'tool' %}" + _RESULTS + "{% elif message.role == 'user' %}"
    "{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _CHATML_END,
    # Reasoning is shown after the last question alone, with an empty block for an answer that has none.
    "qwen3": "{% set last = namespace(question=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}{% set first = messages[0] %}{% if tools or first.role == 'system' %}{{ '<|im_start|>system\n' }}"
    "{{ first.content if first.role == 'system' }}{{ '\n# Tools\n' + (tools | tojson) if tools }}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set parts = (message.content or '').split('</think>') %}{% set content = parts[-1].lstrip('\n') %}"
    "{% set thinking = message.reasoning_content or parts[0].split('<think>')[-1] if parts | length > 1 "
    "or message.reasoning_content else '' %}{{ '<|im_start|>assistant\n' }}⟦"
    "{% if loop.index0 > last.question and (loop.last or thinking) %}"
    "{{ '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    + _CALLS
    + "{{ '<|im_end|>' }}⟧"
    "{{ '\n' }}{% elif message.role == 'tool' %}" + _RESULTS + "{% elif message.role == 'user' %}"
    "{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _CHATML_END,
    # Texts are trimmed; nothing stands between the end of a turn and the header of the next.
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}{% if message.role == 'assistant' %}"
    "⟦{{ message.content | trim + '<|eot_id|>' }}⟧{% else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # The assistant is called model, the system message belongs to the first question, roles have to alternate.
    "gemma3": "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{% if message.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "⟦{{ message.content | trim + '<end_of_turn>' }}⟧{{ '\n' }}{% else %}"
    "{{ '<start_of_turn>user\n' + (system if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # A text that asks for nothing ends with the end of a document, after the end of the turn.
    "phi3": "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' %}⟦{{ message.content + '<|end|>' }}⟧{{ '\n' }}"
    "{% else %}{{ message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
    # The header of an answer opens its thinking; earlier thinking is dropped, and its header opens none.
    "deepseek_r1_distill": "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content }}{% endif %}{% endfor %}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '<｜User｜>' + message.content }}{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "⟦{{ message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}⟧{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
    # Tokens name the roles, and each turn is one line.
    "cohere": "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "⟦{{ message.content.strip() + '<|END_OF_TURN_TOKEN|>' }}⟧{% else %}{{ '<|' + message.role.upper() + '_TOKEN|>' }}"
    "{{ message.content.strip() if message.role == 'user' else message.content }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    # No header before an answer, which begins with a blank, and no system message.
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + '[/INST]' }}{% else %}⟦{{ ' ' + message.content | trim + eos_token }}⟧{% endif %}"
    "{% endfor %}",
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


PLAIN = [
    _message("user", "hi"),
    _message("assistant", "yes"),
    _message("user", "and\n日本?"),
    _message("assistant", "no, it is 7\n\nor 8 🙂"),
    _message("user", "  sure ? "),
    _message("assistant", "yes\n"),
]
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": PLAIN},
    "system": {"messages": [_message("system", "be kind"), *PLAIN[:4]]},
    "thinking": {
        "messages": [
            _message("user", "what is it?"),
            _message("assistant", "<think>\nhm so\n</think>\n\nb"),
            _message("user", "c"),
            _message("assistant", "<think>\nx\n\ny\n</think>\n\nd"),
        ]
    },
    "tools": {
        "tools": [_TOOL],
        "messages": [
            _message("user", "Weather?"),
            _message("assistant", "", tool_calls=[_call("Paris"), _call('a "b"')]),
            _message("tool", "sunny"),
            _message("tool", "rain"),
            _message("assistant", "sunny and rain"),
            _message("user", "thanks"),
            _message("assistant", "you are welcome"),
        ],
    },
}
WITH_TOOLS, WITHOUT_SYSTEM = ("qwen2_5", "qwen3"), ("mistral",)
CASES = [
    (shape, chat)
    for shape in SHAPES
    for chat in CHATS
    if (chat != "tools" or shape in WITH_TOOLS) and (chat != "system" or shape not in WITHOUT_SYSTEM)
]
Labels = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_family_tokenizer(tmp_path_factory.mktemp("family") / "tokenizer", documents))


@pytest.fixture(scope="module")
def learned_by_trl(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Labels]:
    """What TRL's trainer makes of chats: for each, its tokens, and which of them have a loss."""
    processing = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
    processing.pad_token = processing.eos_token
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(processing), **shape))
    folder = tmp_path_factory.mktemp("trl")

    def learn(template: str, records: list[dict[str, Any]]) -> Labels:
        processing.chat_template = template
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(
                output_dir=str(folder), assistant_only_loss=True, use_cpu=True, report_to=[], max_length=None
            ),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=processing,
        )
        rows = [trainer.train_dataset[place] for place in range(len(records))]
        batches = [trainer.data_collator([row]) for row in rows]
        return [
            (batch["input_ids"][0].tolist(), torch.nonzero(batch["labels"][0] != -100).flatten().tolist())
            for batch in batches
        ]

    return learn


def _learned_here(tokenizer: Tokenizer, template: Path, record: dict[str, Any]) -> Labels | BadExample:
    (found,) = ConversationFormat(tokenizer, ChatTemplate(tokenizer, template), "messages").encode_batch([record])
    if isinstance(found, BadExample):
        return found
    return [(example.tokens.tolist(), _places(example)) for example in found]


def _places(example: Example) -> list[int]:
    return [place for place, flag in enumerate(example.has_loss.tolist()) if flag]


def _as_published(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "mistral"])
def test_the_shapes_write_what_the_published_templates_do(shape: str, tokenizer: Tokenizer) -> None:
    """From the first question on: what stands before it, words about tools, is no part of a shape."""
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
    ours = SHAPES[shape].replace(MARKS[0], "").replace(MARKS[1], "")
    for chat in (chat for name, chat in CASES if name == shape):
        messages, tools = CHATS[chat]["messages"], CHATS[chat].get("tools")
        question = next(message["content"] for message in messages if message["role"] == "user")
        for number in range(1, len(messages) + 1):
            for prompt in (False, True):
                texts = [
                    reference.apply_chat_template(
                        messages[:number],
                        tools=tools,
                        tokenize=False,
                        chat_template=template,
                        add_generation_prompt=prompt,
                    )
                    for template in (ours, _as_published(shape))
                ]
                if number == 1 and messages[0]["role"] == "system":
                    continue
                first, second = (text[text.index(question) :] for text in texts)
                assert first == second


@pytest.mark.parametrize(("shape", "chat"), CASES)
def test_the_same_tokens_are_learned_as_in_trl(
    shape: str, chat: str, tokenizer: Tokenizer, learned_by_trl: Callable[..., Labels], tmp_path: Path
) -> None:
    """Every token and every place is equal, but for what a template shows otherwise once the chat continues (thinking):
    TRL learns the one text of the whole chat, without the earlier thinking; here each such turn is a text of its own,
    which is TRL's text of the chat up to that turn, with a loss on that turn alone. Where a prompt opens the thinking,
    it is learned here and not there."""
    record, marked = CHATS[chat], SHAPES[shape]
    plain, spans = marked, marked
    for mark, tag in zip(MARKS, ("{% generation %}", "{% endgeneration %}"), strict=True):
        plain, spans = plain.replace(mark, ""), spans.replace(mark, tag)
    template = tmp_path / "template.jinja"
    template.write_text(plain)
    ours = _learned_here(tokenizer, template, record)

    messages = record["messages"]
    turns = [place for place, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if shape == "deepseek_r1_distill" and chat != "thinking":  # its prompt opens a thought, and there is none
        assert isinstance(ours, BadExample)
        return
    assert not isinstance(ours, BadExample), str(ours)
    theirs = learned_by_trl(spans, [{**record, "messages": messages[:turn]} for turn in turns])
    if (
        shape == "deepseek_r1_distill"
    ):  # its text of a chat has no thinking at all, and what is generated begins with it
        for (own, own_places), (tokens, places) in zip(ours, theirs, strict=True):
            thinking, answer = tokenizer.decode([own[place] for place in own_places]).split("</think>")
            assert thinking.strip() in ("hm so", "x\n\ny")
            assert answer == tokenizer.decode([tokens[place] for place in _last_stretch(places)])
        return
    if len(ours) == 1:
        assert ours == [theirs[-1]]
        return
    assert shape == "qwen3"
    last_turns = [(tokens, _last_stretch(places)) for tokens, places in theirs]
    assert ours == last_turns


def _last_stretch(places: list[int]) -> list[int]:
    begin = max(place for place in places if place - 1 not in places)
    return [place for place in places if place >= begin]
