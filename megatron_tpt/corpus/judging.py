"""The stage in which a language model judges the documents that are kept: in this process, one engine for all shards.

    .work/judge/000002/000013.json     {"answers": {row: {name: answer}}, "problems": {reason: count}}

A shard is written when all its documents are answered, so that a killed job asks again only about the shards that were
in flight. A document without a usable answer has none, and is counted by reason.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_tpt.corpus.annotate.judge import Judge, judged, requests_of
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.documents import Document
from megatron_tpt.corpus.job import PrepareJob, Shard, SourceTask, write_json
from megatron_tpt.corpus.verdicts import Verdicts
from megatron_tpt.jobs.progress import ProgressLine

logger = logging.getLogger(__name__)

JUDGE = "judge"


@dataclass
class _ShardAnswers:
    """The answers about a shard so far."""

    num_judges: int
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)
    num_asked: int = 0
    num_done: int = 0
    is_asked: bool = False
    """Whether all its documents have been asked about."""

    @property
    def is_complete(self) -> bool:
        return self.is_asked and self.num_done == self.num_asked * self.num_judges


def judge_documents(job: PrepareJob, options: CurateOptions) -> None:
    """Ask about the documents of all shards whose answers are not there yet. Raises UserError for a model or judge that
    cannot be loaded, and EngineError when the engine cannot continue."""
    judges = {name: Judge.read(str(path)) for name, path in options.judges()}
    if all(job.path(JUDGE, shard, ".json").exists() for shard in job.shards()):
        return
    from megatron_tpt.generation import load_tokenizer, open_engine

    engine_options = options.engine_options()
    is_served = engine_options.kind == "endpoint"
    has_chat = options.api == "chat" if is_served else load_tokenizer(engine_options.model).chat_template is not None
    open_shards: dict[Shard, _ShardAnswers] = {}
    num_done = 0

    def progress() -> str:
        return f"judge: {num_done:,} answers, {num_done / line.elapsed_s:,.1f}/s"

    with open_engine(engine_options) as engine, ProgressLine() as line:
        requests = requests_of(judges, _documents(job, open_shards, len(judges)), has_chat)
        for (shard, row), name, value, problem in judged(engine, judges, requests):
            found = open_shards[shard]
            found.answers.setdefault(row, {})[name] = value
            found.num_done += 1
            if problem is not None:
                found.problems[f"{name}: {problem}"] += 1
            _write_complete(job, open_shards)
            num_done += 1
            line.show(progress)
        _write_complete(job, open_shards)
    logger.info(progress())


def _documents(
    job: PrepareJob, open_shards: dict[Shard, _ShardAnswers], num_judges: int
) -> Iterator[tuple[tuple[Shard, int], Document]]:
    """The documents to ask about, with shard and row."""
    for source in range(len(job.sources)):
        for shard, rows in SourceTask(job, source, 0, 1).missing(JUDGE, ".json"):
            verdicts = Verdicts(job, shard, job.duplicate_stages)
            state = open_shards[shard] = _ShardAnswers(num_judges)
            for row in rows:
                if row.record is not None and not verdicts.drops(row.number):
                    state.num_asked += 1
                    yield (shard, row.number), Document.of(row.record)
            state.is_asked = True


def _write_complete(job: PrepareJob, open_shards: dict[Shard, _ShardAnswers]) -> None:
    """Write the shards that are complete. (An engine may take the last request after the last answer before it.)"""
    for shard in [shard for shard, state in open_shards.items() if state.is_complete]:
        state = open_shards.pop(shard)
        answers = {str(row): state.answers[row] for row in sorted(state.answers)}
        write_json(job.path(JUDGE, shard, ".json"), {"answers": answers, "problems": state.problems})


def judgements(job: PrepareJob, shard: Shard) -> dict[int, dict[str, Any]]:
    """The answers about a shard, by row."""
    content = orjson.loads(job.path(JUDGE, shard, ".json").read_bytes())
    return {int(row): found for row, found in content["answers"].items()}


def problems(job: PrepareJob, shard: Shard) -> dict[str, int]:
    """How many documents of a shard have no answer, by judge and reason."""
    return orjson.loads(job.path(JUDGE, shard, ".json").read_bytes())["problems"]
