"""What the training thread is doing, for those who watch it from outside (watchdog.py).

    with phase("checkpoint"):  # or @phase("checkpoint")
        ...

Phases nest, and the innermost counts; but all that happens in a validation, for a checkpoint, or to sample and score
the rollouts of reinforcement learning belongs to that.
"""

import contextlib
from collections.abc import Iterator

PHASES = (
    "between steps",
    "validation",
    "checkpoint",
    "rollouts",
    "scoring of rollouts",
    "waiting for data",
    "forward and backward",
    "gradient reduction",
    "update",
)
"""The phases between two steps and within one, in their order, which is the same on all ranks."""
_UNDIVIDED = ("validation", "checkpoint", "rollouts", "scoring of rollouts")
_current = PHASES[0]


def current_phase() -> str:
    """The phase of the training thread of this process: one of PHASES."""
    return _current


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in a phase. Only the training thread calls it."""
    global _current
    outer = _current
    if outer not in _UNDIVIDED:
        _current = name
    try:
        yield
    finally:
        _current = outer
