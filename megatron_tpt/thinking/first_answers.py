"""Failures before the generator has completed anything for a job.

They say more about the generator or the options than about the documents, and none of them is kept.
"""

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Failure, Request
from megatron_tpt.thinking.progress import AugmentProgress
from megatron_tpt.thinking.rows import Outcome
from megatron_tpt.thinking.shards import Output
from megatron_tpt.thinking.thoughts import THOUGHT_REASONS

_FAILURES_UNTIL_STOP = 32


class FirstAnswers:
    """Holds failures back until something is completed, by this task or by whichever one earlier."""

    def __init__(self, output: Output, progress: AugmentProgress) -> None:
        self._output = output
        self._progress = progress
        self._has_completed = False
        self._failures: list[tuple[Request, Failure]] = []

    def take(self, request: Request, outcome: Outcome) -> list[tuple[Request, Outcome]]:
        """What is to be done after this outcome: nothing while it is held. Raises UserError after some failures."""
        if isinstance(outcome, Failure) and not self._look():
            self._failures.append((request, outcome))
            if len(self._failures) >= _FAILURES_UNTIL_STOP:
                self.end()
            return []
        self._has_completed = True
        held, self._failures = self._failures, []
        return [*held, (request, outcome)]

    def end(self) -> None:
        """There are no more outcomes. Raises UserError when some are held."""
        if not self._failures:
            return
        _, failure = self._failures[-1]
        raise UserError(
            f"{self._output.folder}: not one request has been completed for this job, and {len(self._failures):,} have "
            f"failed ({failure.reason}: {failure.message}); correct the options or the server and run it again"
        )

    def _look(self) -> bool:
        """Whether something has been completed, even if the thoughts were rejected."""
        if not self._has_completed:
            (total, _), now = self._output.totals(), self._progress
            reasons = {*total.rejects, *total.chunk_rejects, *now.rejects_before, *now.chunk_rejects_before}
            self._has_completed = bool(total.records or now.records_before or reasons & THOUGHT_REASONS)
        return self._has_completed
