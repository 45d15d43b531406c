"""From what an engine wrote to the thinking of a record: tags removed, a truncated end repaired, a bad thought
rejected."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_tpt.generation import Completion
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.filters import REASONS, cut_to_sentence, judge
from megatron_tpt.thinking.options import Truncated

Wants = Literal["thinking", "answer"]

THOUGHT_REASONS = frozenset((*REASONS, "truncated"))
"""Why a thought that an engine wrote is rejected."""
UNKNOWN = -1
"""In place of the length of a thought that an earlier version rejected."""


@dataclass(frozen=True)
class Thought:
    """The thinking about one stretch of a document."""

    text: str
    """Without tags; empty where it was rejected."""
    num_tokens: int
    """Tokens of `text`, or of `rejected_text`, in the generator's vocabulary; `UNKNOWN` for some rejected ones."""
    truncated: bool
    """Truncated at `max_new_tokens`, whatever was done about it."""
    finish_reason: str
    num_prompt_tokens: int
    reason: str | None = None
    """Why it was rejected."""
    rejected_text: str | None = None
    """What was rejected; None also where the engine wrote nothing."""
    detail: str = ""
    """What more can be said of the reason."""
    attempt: int = 0
    """How often it was asked for again because an earlier thought was rejected."""


class ThoughtReader:
    """Makes thoughts of completions by one set of options."""

    def __init__(
        self,
        wants: Wants,
        open_tag: str,
        close_tag: str,
        truncated: Truncated,
        filters: FilterOptions,
        count_tokens: Callable[[str], int],
        *,
        begins_thinking: bool = False,
    ) -> None:
        """`begins_thinking`: the prompt ends in `open_tag`, so that a completion begins with thinking."""
        self._begins_thinking = begins_thinking
        self._wants = wants
        self._open_tag = open_tag
        self._close_tag = close_tag
        self._truncated = truncated
        self._filters = filters
        self._count_tokens = count_tokens

    def read(self, document: str, completion: Completion) -> Thought:
        """The thought in `completion` about `document`."""
        text, is_cut = self._wanted(completion)
        reason = "truncated" if is_cut and self._truncated == "drop" else None
        if is_cut and self._truncated == "sentence":
            text = cut_to_sentence(text).strip()
        reason = reason or judge(document, text, self._filters)
        return Thought(
            text="" if reason else text,
            num_tokens=self._num_tokens(text, completion),
            truncated=is_cut,
            finish_reason=completion.finish_reason,
            num_prompt_tokens=completion.num_prompt_tokens,
            reason=reason,
            rejected_text=text if reason else None,
        )

    def judge_again(self, document: str, thought: Thought) -> Thought:
        """`thought` by the filters of this reader, whatever other filters decided. Where nothing was written, or the
        limit decided, it is as it was."""
        text = thought.rejected_text if thought.reason else thought.text
        if text is None or thought.reason == "truncated":
            return thought
        reason = judge(document, text, self._filters)
        return replace(thought, text="" if reason else text, reason=reason, rejected_text=text if reason else None)

    def _wanted(self, completion: Completion) -> tuple[str, bool]:
        """The thinking, or the answer after it, and whether the limit cut it."""
        at_limit = completion.finish_reason == "length"
        thinking, closed, answer = completion.text.partition(self._close_tag)
        if self._wants == "answer":
            still_thinking = not closed and (self._begins_thinking or self._open_tag in completion.text)
            return ("" if still_thinking else answer if closed else thinking).strip(), at_limit
        if completion.reasoning is not None:
            return completion.reasoning.strip(), at_limit and not completion.text.strip()
        return thinking.removeprefix(self._open_tag).strip(), at_limit and not closed

    def _num_tokens(self, text: str, completion: Completion) -> int:
        if text == completion.text.strip() and completion.num_tokens > 0:  # 0: a server that does not report it
            # What ended the thinking is not part of it.
            return completion.num_tokens - (completion.finish_reason == "stop")
        return self._count_tokens(text)
