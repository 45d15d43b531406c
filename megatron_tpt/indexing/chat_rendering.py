"""A conversation as texts in which each learned turn appears as it is generated.

At inference the model is given `prompt`, the messages before its turn with the generation prompt, and writes the rest
of `full`, the same messages with its own. A text may teach a turn when it begins with both. One text with all turns is
enough for most templates. Some show a turn otherwise once it is over, without its reasoning for instance (Qwen3,
DeepSeek-R1): such a turn gets a text of its own, which ends with it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_tpt.indexing.chat_program import ChatProgram, Output, Span, TemplateError
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_OPEN_AT_END = re.compile(rf"{re.escape(OPEN_TAG)}\s*\Z")


class Turn(NamedTuple):
    """A turn of the assistant in a text."""

    number: int
    """The message, from 0."""
    prompt_end: int | None
    """The characters of the generation prompt and all before it; None where generation spans say what is learned."""
    spans: list[Span]
    """First and last + 1 character of what is learned of it."""


class Rendered(NamedTuple):
    """A text, and the turns to be learned in it."""

    text: str
    turns: list[Turn]
    more_spans: list[Span]
    """What else is learned: generation spans that belong to no turn of the assistant."""


class _Full(NamedTuple):
    """A turn with the text up to its end. Only what is learned of `text` and all before it count."""

    text: str
    turn: Turn


class ConversationRenderer:
    """Renders one conversation. `special_at_end` finds the last special token of a turn and the blanks after it."""

    def __init__(
        self,
        program: ChatProgram,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        special_at_end: re.Pattern[str],
    ) -> None:
        self._program = program
        self._messages = messages
        self._plain = {**variables, "add_generation_prompt": False}
        self._prompting = {**variables, "add_generation_prompt": True}
        self._special_at_end = special_at_end
        self._has_spans = program.has_spans
        self._whole = program.run(messages, self._plain)
        self._ends: list[int | None] = [None] * (len(messages) + 1)
        self._prompt_closing: str | None = None
        self._prove()

    def _prove(self) -> None:
        """Find where the beginnings of the conversation end in its text, where that needs no rendering of each."""
        whole = self._program.run_watched(self._messages, self._plain)
        if whole is None or whole.output != self._whole:
            return
        self._ends = whole.ends
        prompting = None if self._has_spans else self._program.run_watched(self._messages, self._prompting)
        if prompting is not None and prompting.ends == whole.ends:
            end = whole.ends[-1]
            if prompting.output.text[:end] == whole.output.text[:end]:
                self._prompt_closing = prompting.closing

    def render(self, learned: Sequence[int], reasoning: Mapping[int, str]) -> list[Rendered]:
        """The texts in which the messages `learned` are learned, in their order. Raises TemplateError.

        `reasoning` is that of messages which have any; needed where the template leaves it to the model to show it.
        """
        fulls = [self._full(number, reasoning.get(number)) for number in learned]
        num_turns = sum(message["role"] == "assistant" for message in self._messages)
        texts: list[Rendered] = []
        text = self._whole.text
        while fulls:
            here = [turn for full in fulls if (turn := _placed(full, text)) is not None]
            if here:
                # Only where no turn is marked as not to be learned, spans of unknown origin are surely meant.
                is_all = len(here) == num_turns and text is self._whole.text
                texts.append(Rendered(text, here, self._extra_spans(here) if is_all else []))
                numbers = {turn.number for turn in here}
                fulls = [full for full in fulls if full.turn.number not in numbers]
            if fulls:
                text = fulls[-1].text
        return texts[::-1]

    def _full(self, number: int, reasoning: str | None) -> _Full:
        end = self._ends[number + 1]
        output = self._whole
        if end is None:
            if number + 1 < len(self._messages):
                output = self._program.run(self._messages[: number + 1], self._plain)
            end = len(output.text)
        if self._has_spans:
            return _Full(output.text, Turn(number, None, self._spans(number, output, end)))
        prompt = self._prompt_end(number, output.text, end)
        is_shown = prompt is not None and (not reasoning or _shows(output.text[prompt:end], reasoning))
        if prompt is not None and is_shown:
            return _Full(output.text, Turn(number, prompt, [(prompt, self._end_of_turn(output.text, prompt, end))]))
        if reasoning and CLOSE_TAG in "".join(self._program.fields):
            return self._full_with_reasoning(number, output.text[:end], reasoning)
        if prompt is not None:
            raise TemplateError(
                f"the chat template drops the reasoning of message {number + 1}: write it into the answers with "
                f"--inline-reasoning, or give a template that shows it (--chat-template)"
            )
        raise _not_as_prompted(number)

    def _extra_spans(self, turns: Sequence[Turn]) -> list[Span]:
        taken = {span for turn in turns for span in turn.spans}
        return [span for span in self._whole.spans if span not in taken]

    def _spans(self, number: int, output: Output, end: int) -> list[Span]:
        """The generation spans of one message."""
        begin = self._ends[number]
        if output is self._whole and begin is not None:
            return [span for span in output.spans if begin <= span[0] < end]
        earlier = self._program.run(self._messages[:number], self._plain) if number else Output("", [])
        if spans := output.spans[len(earlier.spans) :]:
            return spans
        # One span around several messages: it is this one's from where it is not the earlier ones' text.
        pairs = enumerate(zip(earlier.text, output.text, strict=False))
        begin = next((place for place, (one, other) in pairs if one != other), min(len(earlier.text), len(output.text)))
        return [(max(first, begin), last) for first, last in output.spans if last > begin]

    def _prompt(self, number: int) -> str:
        end = self._ends[number]
        if end is not None and self._prompt_closing is not None:
            return self._whole.text[:end] + self._prompt_closing
        return self._program.run(self._messages[:number], self._prompting).text

    def _prompt_end(self, number: int, text: str, end: int) -> int | None:
        """The length of the prompt for message `number`; None when `text`, which shows it up to `end`, differs."""
        begin = self._ends[number]
        if begin is not None and self._prompt_closing is not None and text is self._whole.text:
            prompt_end = begin + len(self._prompt_closing)
            return prompt_end if prompt_end <= end and text.startswith(self._prompt_closing, begin) else None
        prompt = self._prompt(number)
        return len(prompt) if len(prompt) <= end and text.startswith(prompt) else None

    def _full_with_reasoning(self, number: int, text: str, reasoning: str) -> _Full:
        """The turn as a model writes it whose template drops reasoning from all turns, since none is to be read."""
        prompt = self._prompt(number)
        opened = _OPEN_AT_END.search(prompt)
        before = prompt[: opened.start()] if opened else prompt
        if not text.startswith(before) or CLOSE_TAG in text[len(before) :]:
            raise _not_as_prompted(number)
        thoughts = ("" if opened else OPEN_TAG + "\n") + reasoning.strip("\n") + f"\n{CLOSE_TAG}\n\n"
        full = prompt + thoughts + text[len(before) :].lstrip("\n")
        return _Full(full, Turn(number, len(prompt), [(len(prompt), self._end_of_turn(full, len(prompt), len(full)))]))

    def _end_of_turn(self, text: str, begin: int, end: int) -> int:
        """The end of what the assistant writes: blanks after the token that ends its turn are the template's."""
        found = self._special_at_end.search(text, begin, end)
        return found.start("blanks") if found else end


def _not_as_prompted(number: int) -> TemplateError:
    return TemplateError(
        f"message {number + 1} does not follow the generation prompt as it is written, so that no model would be asked "
        f"for it; prompts that open or close the thinking need answers with or without reasoning: give another chat "
        f"template (--chat-template), or other variables, as in --chat-template-kwargs '{{\"enable_thinking\": false}}'"
    )


def _placed(full: _Full, text: str) -> Turn | None:
    """The turn as it is in `text`; None where it is missing there, or differs from the turn at inference."""
    turn = full.turn
    if full.text is text:
        return turn
    if turn.prompt_end is not None or not turn.spans:
        end = turn.spans[-1][1] if turn.spans else len(full.text)
        return turn if text.startswith(full.text[:end]) else None
    # What closes the whole conversation may have spans too (Phi-3's end of text): it is learned in its place.
    if not text.startswith(full.text[: turn.spans[0][1]]):
        return None
    spans = [span for span in turn.spans if text.startswith(full.text[: span[1]])]
    return turn._replace(spans=spans)


def _shows(text: str, part: str) -> bool:
    return part.strip() in text
