"""A chat template as a program: what it reads, what it writes, and how much of that the later messages can change.

Templates are untrusted code: they run in transformers' sandbox, with limits on their time, memory and output.

The text of a conversation's beginning is needed for each of its turns, and to render every beginning takes quadratic
time. Most templates need it once: messages are given as a sequence that notes at which place of the output each is
first asked for. Up to there the program cannot know whether the message exists, so that place is where the rendering
without it ends its loop. What follows the loop is the same for all beginnings if it asks for no message and if nothing
but the messages can differ there, which holds for templates without namespaces: Jinja's loops pass nothing else on.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError, one_line
from megatron_tpt.indexing import chat_limits
from megatron_tpt.names import shown

Span = tuple[int, int]

_MAX_MESSAGE = 500
_STATEFUL = {"namespace", "cycler", "joiner", "lipsum"}


class TemplateError(Exception):
    """A conversation that the template cannot show, or not as it must. The text says why."""


class Output(NamedTuple):
    """What a template wrote."""

    text: str
    spans: list[Span]
    """First and last + 1 character of its {% generation %} blocks."""


class Beginnings(NamedTuple):
    """What a template wrote, and where it would have ended for fewer messages."""

    output: Output
    ends: list[int | None]
    """Of the first n messages the text up to the end of the loop; None where that is not proven, [messages + 1]."""
    closing: str
    """What it writes after the loop, the same for each proved end."""


class ChatProgram:
    """A compiled chat template. Raises UserError when it is not valid Jinja."""

    def __init__(self, template: str) -> None:
        import jinja2
        from jinja2 import nodes
        from transformers.utils import chat_template_utils

        # The public function renders in one go; the sandbox and its filters are to be the same.
        environment = chat_template_utils._compile_jinja_template("").environment
        chat_limits.bound_operators(environment)
        try:
            with chat_limits.template_limits():  # constants are computed now
                self._compiled: Any = environment.from_string(template)
                tree = environment.parse(template)
        except jinja2.TemplateSyntaxError as error:
            message = shown(f"line {error.lineno}: {error.message}")[:_MAX_MESSAGE]
            raise UserError(f"the chat template is not valid Jinja: {message}") from None
        except chat_limits.TimeUp:
            raise _never_ends("to be compiled") from None
        except Exception as error:  # foreign code: any, such as Python's own on the nesting of what Jinja made of it
            raise UserError(f"the chat template is not valid Jinja ({_reason(error)})") from None
        self.names = {node.name for node in tree.find_all(nodes.Name)}
        """Variables that it mentions."""
        attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
        self.fields = attributes | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        """Strings and attributes that it mentions: what it can read of a message is among them."""
        self.has_spans = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None
        """Whether it says by {% generation %} blocks what is the assistant's."""
        buffered = [block for kind in (nodes.AssignBlock, nodes.FilterBlock) for block in tree.find_all(kind)]
        # There, what a loop has written is not yet part of the output.
        self._is_provable = not self.names & _STATEFUL and not any(
            next(block.find_all(nodes.For), None) for block in buffered
        )

    def run(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Output:
        """The text of `messages`. Raises TemplateError when the template refuses them, UserError when it never ends."""
        return self._run(messages, variables, _Watch())

    def run_watched(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Beginnings | None:
        """The same, with the ends of the beginnings; None when none is proven."""
        if not self._is_provable:
            return None
        watch = _Watch()
        try:
            output = self._run(_Watched(messages, watch), variables, watch)
        except TemplateError:
            return None  # it may only be that a list can do more
        ends = watch.ends(len(messages))
        if ends is None or ends[-1] is None:
            return None
        return Beginnings(output, ends, output.text[ends[-1] :])

    def _run(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], watch: "_Watch") -> Output:
        blocks: list[str] = []
        spans: list[Span] = []
        try:
            with chat_limits.template_limits(), self._compiled.environment.activate_tracker(blocks, spans):
                for block in self._compiled.generate(messages=messages, **variables):
                    blocks.append(block)
                    watch.place += len(block)
                    if watch.place > chat_limits.MAX_CHARACTERS:
                        limit = f"{chat_limits.MAX_CHARACTERS:,} characters"
                        raise UserError(f"the chat template writes over {limit}: it has no end")
        except chat_limits.TimeUp:
            raise _never_ends("for a conversation") from None
        except MemoryError:
            limit = f"{chat_limits.MAX_BYTES >> 30} GiB of memory"
            raise UserError(f"the chat template takes over {limit} for a conversation: use another one") from None
        except UserError:
            raise
        except Exception as error:  # foreign code: any
            raise TemplateError(f"the chat template refuses it ({_reason(error)})") from None
        return Output("".join(blocks), spans)


def _never_ends(what: str) -> UserError:
    return UserError(
        f"the chat template took over {chat_limits.MAX_SECONDS:g} s of processor time {what}: it has no end"
    )


def _reason(error: Exception) -> str:
    return shown(one_line(error, _MAX_MESSAGE))


class _Watch:
    """What a template has asked for, and where in its output."""

    def __init__(self) -> None:
        self.place = 0
        """Characters written so far."""
        self._ends: dict[int, int | None] = {}
        self._num_loops = 0
        self._is_length_known = False
        self._last_end: int | None = None
        self._least = 1
        self._asks_late = False

    def begin_loop(self) -> None:
        """Messages are about to be asked for one after the other."""
        self._num_loops += 1
        self._asks_late |= self._last_end is not None

    def step(self, number: int, *, in_order: bool) -> None:
        """Message `number` is asked for, by the main loop or otherwise."""
        if self._last_end is not None:
            self._least = max(self._least, number + 1)
        is_end = in_order and not self._is_length_known
        self._ends.setdefault(number, self.place if is_end else None)

    def end_loop(self, *, in_order: bool) -> None:
        """The loop has found that there is no further message."""
        if self._last_end is None and in_order and self._num_loops == 1 and not self._is_length_known:
            self._last_end = self.place
        else:
            self._asks_late = True

    def see_length(self) -> None:
        """The number of messages is asked for, or all of them."""
        self._is_length_known = True
        self._asks_late |= self._last_end is not None

    def ends(self, num_messages: int) -> list[int | None] | None:
        """Where each beginning ends, from none to all messages; None when nothing is proven."""
        if self._last_end is None or self._asks_late:
            return None
        ends = [self._ends.get(number) if number >= self._least else None for number in range(num_messages)]
        return [*ends, self._last_end]


class _Watched(Sequence[Any]):
    """Messages that report every access to a watch. They can do less than a list: what is missing is an error."""

    def __init__(self, messages: Sequence[Any], watch: _Watch, start: int = 0) -> None:
        self._messages = messages
        self._watch = watch
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        self._watch.begin_loop()
        for number in range(self._start, len(self._messages)):
            self._watch.step(number, in_order=_asked_by_main_loop())
            yield self._messages[number]
        self._watch.end_loop(in_order=_asked_by_main_loop())

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key >= 0:
            if self._start + key < len(self._messages):
                self._watch.step(self._start + key, in_order=False)
            return self._messages[self._start + key]
        if isinstance(key, slice) and key.stop is None and key.step in (None, 1) and (key.start or 0) >= 0:
            return _Watched(self._messages, self._watch, self._start + (key.start or 0))
        self._watch.see_length()
        return list(self._messages[self._start :])[key]

    def __len__(self) -> int:
        self._watch.see_length()
        return max(0, len(self._messages) - self._start)

    def __bool__(self) -> bool:
        if self._start < len(self._messages):
            self._watch.step(self._start, in_order=False)
        return self._start < len(self._messages)

    def __repr__(self) -> str:
        self._watch.see_length()
        return repr(list(self._messages[self._start :]))


def _asked_by_main_loop() -> bool:
    """Whether the code that now asks for the next message is a loop of the template's main program, in its turn.

    Not a macro, whose output is not yet written; not `loop.last`, which looks ahead.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name == "__next__":  # of the object `loop`, where the template uses that
        frame = frame.f_back or frame
    return frame.f_code.co_name == "root"
