"""Chat templates of the common families, with and without generation spans, and a tokenizer that knows their tokens."""

import json
from pathlib import Path

from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_SPANS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|header|>' + message.role + '<|/header|>\n\n' + message.content | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
LLAMA_WITH_SPANS = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|header|>' + message.role + '<|/header|>\n\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ message.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
)
# Like Qwen3's: reasoning, which may have a field of its own or stand in the content, is shown in the last turn only.
_WITHOUT_EARLIER_REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set reasoning = message.reasoning_content or"
    " message.content.split('</think>')[0].split('<think>')[-1] if '</think>' in message.content"
    " or message.reasoning_content else '' %}"
    "BEGIN"
    "{% if loop.last and reasoning %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}{% else %}{{ content }}{% endif %}"
    "{{ '<|im_end|>' }}END"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = _WITHOUT_EARLIER_REASONING.replace("BEGIN", "").replace("END", "")
QWEN_WITH_SPANS = _WITHOUT_EARLIER_REASONING.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML

# Counts messages, and says so at the end of what it writes.
STATEFUL = (
    "{% set seen = namespace(users=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}"
    "{{ '<|im_start|>' + message.role + (seen.users | string) + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + (seen.users | string) + '\n' }}{% endif %}"
)
# Shows tools, calls, and reasoning under each of its names, or under one.
KNOWS_ALL = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% set thoughts = message.reasoning_content or message.reasoning or message.thinking %}"
    "{% if thoughts %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }}:{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
READS_THINKING = KNOWS_ALL.replace(
    "message.reasoning_content or message.reasoning or message.thinking", "message.thinking"
)
# Shows reasoning after the last message of the user only, and closes it on demand.
DROPS_REASONING = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Like Mistral's: no generation prompt, tools before the last message of the user only, ids in calls and results.
MISTRAL = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == last.user %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS]["
    "{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{{ '' if loop.last else ', ' }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
FAMILY_TOKENS = [
    *(
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    *SPECIAL_TOKENS,
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "<turn|>", "<|turn>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|observation|>", "[gMASK]", "<sop>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|tool_call_start|>"),
]
"""The special tokens of the models in use whose templates are tried."""


def make_family_tokenizer(folder: Path, records: Path) -> Path:
    """The same with the tokens of all families, a token that begins a text, and no template."""
    options = TrainTokenizerOptions(input=[records], output=folder, vocab_size=460, special_tokens=FAMILY_TOKENS)
    train_tokenizer(options)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|begin_of_text|>"}))
    return folder


def make_chat_tokenizer(folder: Path, records: Path) -> Path:
    """A byte-level BPE tokenizer trained on `records`, with the tokens of these templates, and CHATML as its own."""
    template = folder.with_suffix(".jinja")
    template.write_text(CHATML)
    options = TrainTokenizerOptions(
        input=[records], output=folder, vocab_size=400, special_tokens=SPECIAL_TOKENS, chat_template=template
    )
    return train_tokenizer(options)
