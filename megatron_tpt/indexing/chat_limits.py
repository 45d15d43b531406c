"""Limits on what a chat template may cost. Templates are untrusted code: Jinja's sandbox keeps them from harming
anything but time and memory.

- Processor time: a signal interrupts Python code. What Python cannot interrupt, such as comparing lists that contain
  each other, ends with the process: the kernel kills it some seconds later.
- Memory: the address space may only grow by a fixed amount.
- Numbers and repeated texts are bounded before they are computed, also where Jinja computes constants on compiling.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_SECONDS = 5.0
"""Of processor time, for one rendering or compilation."""
MAX_CHARACTERS = 1 << 28
MAX_BYTES = 2 << 30
"""Memory that one rendering may take."""
_SECONDS_UNTIL_KILLED = 30.0
_MAX_BITS = 1 << 14  # what Python writes in digits


class TimeUp(BaseException):
    """Raised inside a template that runs too long; no `except` of a library catches it."""


def bound_operators(environment: Any) -> None:
    """Make templates that `environment` compiles from now on refuse products and powers that are too large."""

    def operate(context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_too_large(operator, left, right):
            raise OverflowError(f"the result of {operator} is too large")
        return environment.binop_table[operator](left, right)

    environment.intercepted_binops = frozenset({"*", "**"})
    environment.call_binop = operate


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            return abs(left) > 1 and right * left.bit_length() > _MAX_BITS
        return left.bit_length() + right.bit_length() > _MAX_BITS
    if isinstance(right, int):
        left, right = right, left
    return isinstance(left, int) and hasattr(right, "__len__") and left * len(right) > MAX_CHARACTERS


@contextmanager
def template_limits() -> Iterator[None]:
    """Raise TimeUp or MemoryError in here after too much of either. Only the main thread can be interrupted; in others,
    the kernel's limit holds alone."""
    with _memory_limit(), _kill_timer():
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGVTALRM, _stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, previous)


def _stop(*_: object) -> None:
    raise TimeUp


@contextmanager
def _kill_timer() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, _SECONDS_UNTIL_KILLED)  # SIGPROF, whose default is the end
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
