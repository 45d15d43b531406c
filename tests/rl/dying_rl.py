"""Trains as megatron_tpt.rl, but is killed (kill -9) inside of a phase of the second iteration, or its graders are.

--kill=PHASE names one of PHASES. --kill=graders kills a grader of every wave, while it has an answer.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_tpt.generation.transformers_engine import TransformersEngine
from megatron_tpt.grading import GraderPool
from megatron_tpt.rl import rollout_log, weights
from megatron_tpt.rl.__main__ import main as train
from megatron_tpt.rl.scoring import ProcessScorer, Scorer
from megatron_tpt.training.trainer import Trainer

PHASES: dict[str, tuple[Any, str, int]] = {
    "sending weights": (weights, "whole_weights", 4),
    "sampling": (TransformersEngine, "generate", 8),
    "grading": (GraderPool, "_give", 3 * 16 + 5),
    "scoring": (Scorer, "values", 2),
    "scoring answers": (ProcessScorer, "__call__", 2),
    "writing rollouts": (rollout_log, "json_lines", 2),
    "between the steps of critic and policy": (Trainer, "step", 5),
    "after the policy's step": (Trainer, "step", 6),
}
"""Whose attribute is called, and at which call the process is killed. A wave has one call of the first, two of the
second and sixteen of the third, an iteration one of the others, and four steps."""


def main() -> None:
    """Arrange the end, and train."""
    option = next(argument for argument in sys.argv if argument.startswith("--kill="))
    sys.argv.remove(option)
    phase = option.removeprefix("--kill=")
    if phase == "graders":
        kill_graders()
    else:
        die_at(*PHASES[phase])
    train()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: Any, name: str, call: int) -> None:
    """Be killed at a call: in the middle of what it yields, else when it returns."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    def within(values: Iterator[Any]) -> Iterator[Any]:
        yield from itertools.islice(values, 2)
        die()

    def deadly(*arguments: Any, **options: Any) -> Any:
        is_due = next(calls) == call
        result = real(*arguments, **options)
        if is_due and isinstance(result, Iterator):
            return within(result)
        if is_due:
            die()
        return result

    setattr(owner, name, deadly)


def kill_graders() -> None:
    """Kill the grader that has the first answer of a wave. (A second call has those whose graders crashed.)"""
    grade, give = GraderPool.grade, GraderPool._give
    calls = itertools.count()
    is_due = False

    def graded(self: GraderPool, items: Any) -> Any:
        nonlocal is_due
        is_due = next(calls) % 2 == 0
        return grade(self, items)

    def given(self: GraderPool, worker: Any, index: int, item: Any) -> None:
        nonlocal is_due
        give(self, worker, index, item)
        if is_due:
            is_due = False
            os.kill(worker.process.pid, signal.SIGKILL)
            print("killed a grader", flush=True)

    GraderPool.grade, GraderPool._give = graded, given  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
