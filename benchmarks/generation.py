"""Output tokens/s of a real model: through our engines and the thinking job, against vLLM driven directly and against
transformers.

python benchmarks/generation.py --model SMOLLM2_DIR --data gsm8k_train.jsonl

The same prompts, seeds and sampling on all sides, which take turns in one run:

    vllm          LLM.generate of all prompts at once, in this process
    job           the whole of tools/augment.py (reading, prompts, journal, filters, shards) on the same LLM
    server-job    the same with the engine vllm-server, which has a server of its own
    engine        our engine "vllm" on the same LLM, and nothing else
    server        our engine "vllm-server", and nothing else
    transformers  model.generate, in batches of as many prompts as vLLM computes at once

The speed of shared machines drifts by several percent from one turn to the next. So vLLM's turn comes before and after
the turns of the others, and each of these is compared with vLLM's speed interpolated in time between the two. The
result is the median of the rounds. For turns in this process the steps of the engine are counted, with the tokens
that each computes: where they are the same, the steps do the same work. Every round is written as it ends to
benchmarks/results/generation.json, unless --output names another file. SMOLLM2_DIR is what
examples/smollm2/fetch.sh makes.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from augmenting import RESULTS, SERVER_ENVIRONMENT, VLLM, direct, forget_prefixes, prompts_and_seeds, whole_job

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import NonNegativeInt, PositiveInt
from megatron_tpt.files import write_json
from megatron_tpt.generation import Engine, EngineOptions, Request, Sampling, expect_completion, open_engine
from megatron_tpt.generation.cpu import num_threads
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions

Measure = Callable[[], tuple[int, float]]
"""Output tokens, and the seconds that they took."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to generate, and how often."""

    model: Path
    """The folder of the model."""
    data: Path
    """JSONL with the column question, such as GSM8K's gsm8k_train.jsonl."""
    num_documents: PositiveInt = 40
    max_num_seqs: PositiveInt = 16
    """Places of the engines. There are over twice as many documents, so that all sides refill places as they become
    free: the job has as many again wait at the engine."""
    max_new_tokens: PositiveInt = 48
    rounds: PositiveInt = 8
    """Turns of job and server-job."""
    engine_rounds: NonNegativeInt = 3
    """Turns of engine and server."""
    transformers_rounds: NonNegativeInt = 2
    output: Path | None = None
    """Where the figures go."""


@dataclass
class Turn:
    """One side's measurement."""

    side: str
    middle_s: float
    """When half of its time was over (time.perf_counter())."""
    seconds: float
    num_tokens: int
    cpu_s: dict[str, float]
    """Processor time of this process and of the servers."""
    steps: list[tuple[int, int]]
    """Tokens and sequences of every step of the engine in this process."""
    load: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """The figures of this turn."""
        prefills = [tokens for tokens, sequences in self.steps if tokens > sequences]
        return {
            "side": self.side,
            "load": round(self.load, 2),
            "seconds": round(self.seconds, 3),
            "tokens": self.num_tokens,
            "tokens_per_s": round(self.tokens_per_s, 3),
            "cpu_s": {name: round(value, 2) for name, value in self.cpu_s.items()},
            "num_steps": len(self.steps),
            "tokens_of_prefill_steps": prefills,
        }


def augment_options(options: BenchmarkOptions, data: Path, output: Path, **changes: Any) -> AugmentOptions:
    return AugmentOptions(
        input=[str(data)],
        output=output,
        model=str(options.model),
        text_column="question",
        max_document_tokens=512,
        max_num_seqs=options.max_num_seqs,
        max_new_tokens=options.max_new_tokens,
        filters=FilterOptions(),
        **changes,
    )


def through_engine(engine: Engine, sampling: Sampling, requests: Sequence[tuple[Any, int]]) -> tuple[int, float]:
    """Output tokens and seconds of an engine of ours."""
    start = time.perf_counter()
    asked = (Request(prompt, dataclasses.replace(sampling, seed=seed)) for prompt, seed in requests)
    num_tokens = sum(expect_completion(outcome).num_tokens for _, outcome in engine.generate(asked))
    return num_tokens, time.perf_counter() - start


def through_transformers(
    model: Any, sampling: Sampling, requests: Sequence[tuple[Any, int]], batch_size: int
) -> tuple[int, float]:
    """Output tokens and seconds of transformers, whose batches wait for their longest output."""
    import torch

    start, num_tokens, pad = time.perf_counter(), 0, model.config.eos_token_id
    for begin in range(0, len(requests), batch_size):
        prompts = [prompt for prompt, _ in requests[begin : begin + batch_size]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(requests[begin][1])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
            )[:, width:].tolist()
        num_tokens += sum(own.index(pad) + 1 if pad in own else len(own) for own in output)
    return num_tokens, time.perf_counter() - start


class StepCounter:
    """Notes what the engine in this process schedules for every step."""

    def __init__(self, engine: Any) -> None:
        self._scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        self._schedule = self._scheduler.schedule
        self.steps: list[tuple[int, int]] = []

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        output = self._schedule(*args, **keywords)
        self.steps.append((output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)))
        return output

    def __enter__(self) -> list[tuple[int, int]]:
        self._scheduler.schedule = self
        return self.steps

    def __exit__(self, *_: object) -> None:
        self._scheduler.schedule = self._schedule


def processor_seconds() -> dict[str, float]:
    """Processor time so far, of this process and of its children."""
    own = psutil.Process()
    found = {"own": sum(own.cpu_times()[:2]), "servers": 0.0}
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found["servers"] += sum(child.cpu_times()[:2])
    return found


def take_turn(side: str, measure: Measure, engine: Any, server: Any) -> Turn:
    """One measurement of one side; prompts that vLLM remembers are forgotten first."""
    for each in (engine, server):
        forget_prefixes(each)
    load, before = os.getloadavg()[0], processor_seconds()
    with StepCounter(engine) as steps:
        num_tokens, seconds = measure()
    end, after = time.perf_counter(), processor_seconds()
    used = {name: after[name] - before[name] for name in after}
    return Turn(side, end - seconds / 2, seconds, num_tokens, used, steps, load)


def order_of(options: BenchmarkOptions) -> list[tuple[str, ...]]:
    """The sides of every round, in alternating order; vLLM comes before, between and after the rounds."""
    rounds: list[tuple[str, ...]] = [("job", "server-job")] * options.rounds
    rounds += [("engine", "server")] * options.engine_rounds + [("transformers",)] * options.transformers_rounds
    return [sides if i % 2 == 0 else sides[::-1] for i, sides in enumerate(rounds)]


def ratios(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """Of every side but vLLM: its speed in each turn, over that of vLLM interpolated between its turns around it."""
    found: dict[str, list[float]] = {}
    base = [turn for turn in turns if turn.side == "vllm"]
    for before, after in itertools.pairwise(base):
        for turn in turns[turns.index(before) + 1 : turns.index(after)]:
            share = (turn.middle_s - before.middle_s) / (after.middle_s - before.middle_s)
            expected = (1 - share) * before.tokens_per_s + share * after.tokens_per_s
            found.setdefault(turn.side, []).append(turn.tokens_per_s / expected)
    return found


def summary(turns: Sequence[Turn], options: BenchmarkOptions, engine: Engine) -> dict[str, Any]:
    """What is written."""
    by_side: dict[str, list[float]] = {}
    for turn in turns:
        by_side.setdefault(turn.side, []).append(turn.tokens_per_s)
    of_vllm = ratios(turns)
    kept = {name: str(value) for name, value in vars(options).items() if name not in ("data", "output", "model")}
    return {
        "median_tokens_per_s": {side: round(statistics.median(values), 3) for side, values in by_side.items()},
        "median_ratio_to_vllm": {side: round(statistics.median(values), 4) for side, values in of_vllm.items()},
        "ratios_to_vllm": {side: [round(value, 4) for value in values] for side, values in of_vllm.items()},
        "turns": [turn.as_json() for turn in turns],
        "options": kept | {"model": options.model.resolve().name, "dtype": engine.dtype, "threads": num_threads()},
        "versions": {name: version(name) for name in (VLLM, "torch", "transformers")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


@contextlib.contextmanager
def opened(options: BenchmarkOptions, folder: Path) -> Iterator[tuple[dict[str, Measure], Any, Any]]:
    """The sides with what they need, the engine in this process, and the one with a server."""
    os.environ |= SERVER_ENVIRONMENT
    data = folder / "documents.jsonl"
    with options.data.open() as file:
        data.write_text("".join(line for _, line in zip(range(options.num_documents), file, strict=False)))
    job = augment_options(options, data, folder / "job")
    server_job = augment_options(options, data, folder / "server-job", engine="vllm-server")
    engine_options, sampling, requests = prompts_and_seeds(job)
    assert len(requests) == options.num_documents, "--data has fewer documents"
    with contextlib.ExitStack() as engines:
        engine: Any = engines.enter_context(open_engine(engine_options))
        of_server = dataclasses.replace(engine_options, kind="vllm-server", log_dir=folder / "logs")
        server = engines.enter_context(open_engine(of_server))
        model = load_transformers(engine_options, engine.dtype) if options.transformers_rounds else None
        sides: dict[str, Measure] = {
            "vllm": lambda: direct(engine, sampling, requests),
            "job": lambda: done(whole_job(engine, job), job),
            "server-job": lambda: done(whole_job(server, server_job), server_job),
            "engine": lambda: through_engine(engine, sampling, requests),
            "server": lambda: through_engine(server, sampling, requests),
            "transformers": lambda: through_transformers(model, sampling, requests, options.max_num_seqs),
        }
        yield sides, engine, server


def done(figures: tuple[int, float], job: AugmentOptions) -> tuple[int, float]:
    """The figures of a job, whose output is removed, so that it can be done again."""
    shutil.rmtree(job.output)
    return figures


def load_transformers(options: EngineOptions, dtype: str) -> Any:
    """The model for transformers, in the number format of the engines."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype)).eval()


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    output = options.output or RESULTS / "generation.json"
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as name, opened(options, Path(name)) as (sides, engine, server):
        for side in ("job", "server-job"):
            sides[side]()  # what happens once is not measured
        for sides_of_round in [("vllm",), *((*own, "vllm") for own in order_of(options))]:
            for side in sides_of_round:
                turns.append(take_turn(side, sides[side], engine, server))
                print(json.dumps(turns[-1].as_json()), flush=True)
            if len(turns) > 1:
                write_json(output, summary(turns, options, engine), indent=1)
    for side, ratio in summary(turns, options, engine)["median_ratio_to_vllm"].items():
        print(f"{side}: {ratio:.1%} of the output tokens/s of vLLM (median)")


if __name__ == "__main__":
    run(main)
