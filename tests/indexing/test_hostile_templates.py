"""Chat templates that attack: code, time, memory and output. Each ends with a message."""

import contextlib
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_tpt.errors import UserError
from megatron_tpt.generation import render_chat
from megatron_tpt.indexing import chat_limits
from megatron_tpt.indexing.chat_program import ChatProgram, TemplateError

TEACHER = Path(__file__).parents[2] / "examples/demo/teacher"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"

ATTACKS = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "change of messages": "{{ messages.append(messages[0]) }}",
    "division": "{{ 1 / 0 }}",
    "decoding": "{{ messages[0].content[:1].encode('latin-1').decode('utf-16') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "constant power": "{{ 9 ** (9 ** 9) }}",
    "power": "{{ (messages | length) ** 999999999999 }}",
    "power of a negative": "{{ (-9) ** 9999999 }}",
    "products": "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "constant repetition": "{{ ('a' * 5000000000) | length }}",
    "repetition": "{{ (messages[0].content * 5000000000) | length }}",
    "repetition on the right": "{{ (5000000000 * messages[0].content) | length }}",
    "repetition of a list": "{{ (messages * 5000000000) | length }}",
    "range": "{{ range(999999999) | length }}",
    "padding": "{{ messages[0].content | center(50000000000) }}",
    "constant padding": "{{ 'a' | center(50000000000) }}",
    "format of width": "{{ '%50000000000d' % (messages | length) }}",
    "indentation": "{{ messages | tojson(indent=50000000000) }}",
    "doubled text": DOUBLED.replace("START", "messages[0].content"),
    "doubled list": DOUBLED.replace("START", "messages"),
    "replacement": "{{ ('a' * 9999999) | replace('a', 'b' * 9999999) }}",
    "joined": "{{ (range(99999) | list * 999) | join('b' * 99999999) }}",
    "nesting": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nested blocks": "{% if x %}" * 300 + "{% endif %}" * 300,
    "unknown filter": "{{ 'a' | nothing_known }}",
    "control characters": "{% \x1b[31m %}",
    "raised": "{{ raise_exception('no\x1b]0;title\x07') }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_template_is_refused_in_one_printable_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_limits, "MAX_BYTES", 256 << 20)
    with pytest.raises((UserError, TemplateError)) as caught:
        ChatProgram(ATTACKS[name]).run(MESSAGES, {"add_generation_prompt": False})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOPS, "processor time for a conversation: it has no end"),
        ("{% for a in range(99999) %}{% for b in range(99) %}aaaaaaaaaa{% endfor %}{% endfor %}", "has no end"),
        ("{% for a in range(99) %}{{ 'b' * 99999999 }}{% endfor %}", "characters: it has no end"),
        ("{{ 'a' | center(50000000000) }}" + "{{ messages[0].content | center(50000000000) }}", "GiB of memory"),
    ],
)
def test_endless_time_output_and_memory_have_a_message_each(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_limits, "MAX_SECONDS", 0.3)
    with pytest.raises(UserError, match=words):
        ChatProgram(template).run(MESSAGES, {})


def test_the_limits_end_with_the_rendering() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    for template in (LOOPS[:0], "{{ 1 / 0 }}"):
        with contextlib.suppress(TemplateError):
            ChatProgram(template).run(MESSAGES, {})
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_templates_are_rendered_in_other_threads_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(ChatProgram("{{ messages[0].role }}").run(MESSAGES, {}).text))
    thread.start()
    thread.join()
    assert found == ["user"]


def test_what_python_cannot_interrupt_ends_with_the_process() -> None:
    twice = "{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
    template = "{% set ns = namespace(x=[], y=[]) %}" + twice + "{{ ns.x == ns.y }}"
    program = f"""
from megatron_tpt.indexing import chat_limits
from megatron_tpt.indexing.chat_program import ChatProgram
chat_limits.MAX_SECONDS, chat_limits._SECONDS_UNTIL_KILLED = 0.1, 0.5
ChatProgram({template!r}).run([], {{}})
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=300).returncode == -signal.SIGPROF


def tokenizer_with(template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TEACHER)
    tokenizer.chat_template = template
    return tokenizer


def test_prompts_are_rendered_as_transformers_does() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content | tojson }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}\n"
        "{% endfor %}{{ tools }} {{ documents }} {{ key * 3 }} {% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, key="é")
    assert render_chat(tokenizer, MESSAGES, key="é") == expected


@pytest.mark.parametrize("template", [LOOPS, ATTACKS["constant power"], ATTACKS["division"], ATTACKS["attributes"]])
def test_prompts_of_a_hostile_template_end_with_a_message(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_limits, "MAX_SECONDS", 0.3)
    with pytest.raises(UserError, match="the chat template"):
        render_chat(tokenizer_with(template), MESSAGES)
