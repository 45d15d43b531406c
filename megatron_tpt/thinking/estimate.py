"""What would thinking about a whole corpus cost? Answered by thinking about a few documents drawn from it.

How many documents there are is counted where that is cheap, else estimated (`input_sample.py`); tokens and rejects
follow from the sample, seconds from the time that the engine took for it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megatron_tpt.generation import Completion, Request, open_engine
from megatron_tpt.thinking.input_sample import Drawn, draw_rows
from megatron_tpt.thinking.job import Generator, plan
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import counts
from megatron_tpt.thinking.rows import count_rejects
from megatron_tpt.thinking.statistics import LengthStatistics
from megatron_tpt.units import duration

logger = logging.getLogger(__name__)

_MIN_REFILLS = 3  # from here on the time in which the last ones drain is a small part


@dataclass
class Estimate:
    """The totals of a whole job, from a sample of it."""

    num_sampled: int
    documents: float
    """Good records in the input."""
    is_counted: bool
    """Whether all of them were counted, not estimated."""
    extent: str
    """What the sample was drawn from, in words."""
    document_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    prompt_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    thinking_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    """Per document, all that is generated; rejected thoughts too."""
    num_records: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    chunk_rejects: Counter[str] = field(default_factory=Counter)
    generation_s: float = 0.0
    device: str = "device"
    """What is counted as one: a device (GPU or CPU), or a server whose devices are not known."""
    num_devices: int = 1
    max_in_flight: int = 1
    """Most requests that the engine had at once, those that waited in it included."""
    num_requests: int = 1

    @property
    def device_hours(self) -> float:
        """Hours of all devices together (GPUs, this CPU, or servers elsewhere) at the speed of the sample."""
        return self.generation_s * self.documents / self.num_sampled * self.num_devices / 3600

    @property
    def engine_was_full(self) -> bool:
        """Whether places in the engine were filled again often enough for the speed to be that of a long run."""
        return self.num_requests >= _MIN_REFILLS * self.max_in_flight

    def summary(self) -> str:
        """Some lines for the terminal."""
        accepted = self.num_records / max(self.num_records + self.rejects.total(), 1)
        rejects = f" (rejected: {counts(self.rejects)})" if self.rejects else ""
        rejects += f"; chunks rejected: {counts(self.chunk_rejects)}" if self.chunk_rejects else ""
        lines = [
            f"{'counted' if self.is_counted else 'estimated'}: {self.documents:,.0f} documents",
            f"from {self.num_sampled:,} of them (drawn from {self.extent}), with 95% intervals:",
            *(
                f"  {name:<16} {self._total(lengths)}"
                for name, lengths in (
                    ("document tokens", self.document_tokens),
                    ("prompt tokens", self.prompt_tokens),
                    ("thinking tokens", self.thinking_tokens),
                )
            ),
            f"  accepted         {accepted:.1%}{rejects}",
            f"  speed            {self.thinking_tokens.total / self.generation_s:,.0f} tokens/s "
            f"on {self.num_devices} {self.device}{'s' if self.num_devices > 1 else ''}" + self._caveat(),
            f"  cost             {self.device_hours:,.2f} {self.device} hours, "
            f"{duration(self.device_hours * 3600)} on one",
        ]
        return "\n".join(lines)

    def _caveat(self) -> str:
        if self.engine_was_full:
            return ""
        needed = math.ceil(_MIN_REFILLS * self.max_in_flight * self.num_sampled / self.num_requests)
        more = f"at least {needed:,} " if self.max_in_flight < self.num_requests else "more "
        return f"; the engine was not full for long, so the real cost is lower: {more}documents give a better estimate"

    def _total(self, lengths: LengthStatistics) -> str:
        half = self.documents * lengths.half_interval
        return f"{self.documents * lengths.mean:,.0f} ± {half:,.0f} ({lengths.mean:,.0f} each)"


def estimate(options: AugmentOptions) -> Estimate:
    """Think about `options.estimate` documents drawn from the input; writes nothing.

    Raises UserError for what the user can fix.
    """
    for note in options.notes():
        logger.info(f"note: {note}")
    job = plan(options)
    sample = draw_rows(job, options.estimate or 1)
    result = Estimate(len(sample.rows), sample.documents, sample.is_counted, sample.extent)
    result.device = "server" if options.engine == "endpoint" else "device"
    _think(job.generator(), sample.rows, result)
    return result


def _think(generator: Generator, rows: list[Drawn], result: Estimate) -> None:
    worker, sampling = generator.worker, generator.sampling
    opened = [worker.open(row, source.name) for source, row in rows]
    result.num_requests = sum(row.num_requests for row in opened)
    num_in_flight = 0

    def requests() -> Iterator[Request]:
        nonlocal num_in_flight
        for row in opened:
            for number, prompt, seed in worker.requests(row):
                num_in_flight += 1
                result.max_in_flight = max(result.max_in_flight, num_in_flight)
                yield Request(prompt, replace(sampling, seed=seed), (row, number))

    with open_engine(generator.engine_options) as engine:
        result.num_devices = engine.num_devices
        start = time.monotonic()
        for request, outcome in engine.generate(requests()):
            num_in_flight -= 1
            row, number = request.key
            row.outcomes[number] = outcome
        result.generation_s = time.monotonic() - start
    for row in opened:
        line = worker.close(row)
        result.num_records += len(line.records)
        rejects, chunk_rejects = count_rejects(line.rejects)
        result.rejects.update(rejects)
        result.chunk_rejects.update(chunk_rejects)
        completions = [outcome for outcome in row.outcomes.values() if isinstance(outcome, Completion)]
        result.document_tokens.add(row.num_document_tokens)
        result.prompt_tokens.add(sum(completion.num_prompt_tokens for completion in completions))
        result.thinking_tokens.add(sum(completion.num_tokens for completion in completions))
