"""What would thinking about a whole corpus cost? Answered by thinking about a few documents drawn from it.

The number of documents is counted where that is cheap and else follows from the size of the files and of the rows that
were looked at; tokens and rejects follow from the sample, seconds from the speed of the engine on it.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Completion, Request, open_engine
from megatron_tpt.records import Progress as ReadProgress
from megatron_tpt.records import Row, Source, read_blocks
from megatron_tpt.thinking.job import Generator, Job, plan
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import duration
from megatron_tpt.thinking.statistics import LengthStatistics

# So much of the input is looked at, in pieces from up to so many sources.
_MAX_BYTES = 256 << 20
_MAX_SOURCES = 64
_ROWS_PER_BLOCK = 1000
_Z_95 = 1.96


@dataclass
class Estimate:
    """The totals that a job would come to, from a sample of it."""

    num_sampled: int
    documents: float
    """Good records in the input."""
    is_counted: bool
    """Whether all of them were counted, not estimated."""
    document_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    prompt_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    thinking_tokens: LengthStatistics = field(default_factory=LengthStatistics)
    """Per document, all that is generated; rejected thoughts too."""
    num_records: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    generation_s: float = 0.0
    devices: int = 1
    engine_was_full: bool = True

    @property
    def total_thinking_tokens(self) -> float:
        """Tokens to generate for the whole input."""
        return self.documents * self.thinking_tokens.mean

    @property
    def device_hours(self) -> float:
        """GPU hours (or hours of this CPU) at the speed of the sample."""
        return self.total_thinking_tokens / self._tokens_per_s * self.devices / 3600

    @property
    def _tokens_per_s(self) -> float:
        return self.thinking_tokens.total / self.generation_s

    def summary(self) -> str:
        """Some lines for the terminal."""
        accepted = self.num_records / max(self.num_records + self.rejects.total(), 1)
        rejects = ", ".join(f"{reason} {count}" for reason, count in self.rejects.most_common())
        lines = [
            f"{'counted' if self.is_counted else 'estimated'}: {self.documents:,.0f} documents",
            f"from {self.num_sampled:,} of them, with 95% intervals:",
            *(
                f"  {name:<16} {self._total(lengths)}"
                for name, lengths in (
                    ("document tokens", self.document_tokens),
                    ("prompt tokens", self.prompt_tokens),
                    ("thinking tokens", self.thinking_tokens),
                )
            ),
            f"  accepted         {accepted:.1%}" + (f" (rejected: {rejects})" if rejects else ""),
            f"  speed            {self._tokens_per_s:,.0f} tokens/s on {self.devices} device(s)"
            + ("" if self.engine_was_full else "; the engine was not full: more documents give a truer figure"),
            f"  cost             {self.device_hours:,.2f} device hours, {duration(self.device_hours * 3600)} on one",
        ]
        return "\n".join(lines)

    def _total(self, lengths: LengthStatistics) -> str:
        half = _Z_95 * lengths.std / math.sqrt(lengths.count) if lengths.count > 1 else math.nan
        return f"{self.documents * lengths.mean:,.0f} ± {self.documents * half:,.0f} ({lengths.mean:,.0f} each)"


def estimate(options: AugmentOptions) -> Estimate:
    """Think about `options.estimate` documents drawn from the input; writes nothing.

    Raises UserError for what the user can mend.
    """
    job = plan(options)
    rows, documents, is_counted = _sample(job, options.estimate or 1)
    result = Estimate(len(rows), documents, is_counted)
    _think(job, job.generator(), rows, result)
    return result


def _sample(job: Job, num_rows: int) -> tuple[list[tuple[Source, Row]], float, bool]:
    """Rows drawn from the input, how many good ones there are in all, and whether that was counted.

    Every row that is looked at has the same chance (algorithm R, Vitter 1985).
    """
    chance = random.Random(job.options.seed)
    step = max(len(job.sources) / _MAX_SOURCES, 1)
    looked_at = [job.sources[int(i * step)] for i in range(min(len(job.sources), _MAX_SOURCES))]
    drawn: list[tuple[Source, Row]] = []
    num_good = num_bytes = 0
    is_counted = len(looked_at) == len(job.sources)
    for source in looked_at:
        position = ReadProgress()
        rows = _good_rows(job, source, position)
        limit = _MAX_BYTES // len(looked_at)
        for row in rows:
            num_good += 1
            if len(drawn) < num_rows:
                drawn.append((source, row))
            elif (at := chance.randrange(num_good)) < num_rows:
                drawn[at] = source, row
            if position.num_bytes > limit:
                is_counted = False
                break
        num_bytes += position.num_bytes if position.num_bytes else 0
    if is_counted:
        return drawn, num_good, True
    sizes = [source.num_bytes for source in job.sources]
    if None in sizes:
        raise UserError("the size of a streamed data set is not known; download it, or estimate from some of its files")
    return drawn, num_good * sum(size or 0 for size in sizes) / num_bytes, False


def _good_rows(job: Job, source: Source, position: ReadProgress) -> Iterator[Row]:
    for _, rows in read_blocks(source, job.columns, _ROWS_PER_BLOCK, lambda block: True, position):
        yield from (row for row in rows if row.record is not None)


def _think(job: Job, generator: Generator, rows: Sequence[tuple[Source, Row]], result: Estimate) -> None:
    worker, sampling = generator.worker, generator.sampling
    opened = [worker.open(row, source.name) for source, row in rows]
    requests = (
        Request(prompt, replace(sampling, seed=seed), (row, request))
        for row in opened
        for request, prompt, seed in worker.requests(row)
    )
    with open_engine(generator.engine_options) as engine:
        start = time.monotonic()
        for request, outcome in engine.generate(requests):
            row, number = request.key
            row.outcomes[number] = outcome
        result.generation_s = time.monotonic() - start
    for row in opened:
        line = worker.close(row)
        result.num_records += len(line.records)
        result.rejects.update(reject["reason"] for reject in line.rejects)
        completions = [outcome for outcome in row.outcomes.values() if isinstance(outcome, Completion)]
        result.document_tokens.add(row.num_document_tokens)
        result.prompt_tokens.add(sum(completion.num_prompt_tokens for completion in completions))
        result.thinking_tokens.add(sum(completion.num_tokens for completion in completions))
    options = job.options
    result.devices = options.tensor_parallel_size * (options.num_engines or 1)
    result.engine_was_full = len(rows) >= 4 * (options.max_num_seqs or 256)
