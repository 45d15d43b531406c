"""How long `python -m megatron_tpt.pretrain` takes from its start to the end of its first step, by the number of index
files.

python benchmarks/startup.py [--files 2000 20000] [--rounds 1]

The indices have random tokens and are written by the project's writer; each is a source of its own, matched by a
wildcard, and the run would read all once. `cold`: no sample indices in the cache. `warm`: those of the cold start.
(The files are new, so in the page cache both times.) The tiny model computes next to nothing. Seconds on the clock,
and of the process on the cores (`cpu_s`), which other programs on the machine change less; `load` is that of the
machine before the start. A run on random tokens from memory (`no files`) is the part that has nothing to do with the
data.
"""

import dataclasses
import itertools
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import yaml
from random_corpus import VOCAB_SIZE, make_indices, measured_on

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json
from megatron_tpt.indexing.manifest import IndexCounts, Manifest
from megatron_tpt.indexing.writer import IndexWriter

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parents[1]
BATCH, LENGTH = 4, 128


@dataclass(frozen=True)
class BenchmarkOptions:
    """How many files, and how often."""

    files: tuple[int, ...] = (2000, 20_000)
    """Numbers of index files, each a source of the blend; measured one after the other."""
    documents: int = 100
    """Documents in each, of 100 tokens."""
    rounds: int = 1
    """Cold and warm starts of each number."""
    folder: Path = Path(tempfile.gettempdir()) / "startup-benchmark"
    """Where indices and runs go; removed at the end."""
    output: Path = RESULTS / "startup.json"
    """Where the figures go."""


def write_index(prefix: Path, model: Manifest, num_documents: int, seed: int) -> None:
    """An index of random tokens, with a manifest like `model`."""
    draw = numpy.random.default_rng(seed)
    lengths = draw.integers(50, 150, size=num_documents).astype(numpy.int32)
    tokens = draw.integers(VOCAB_SIZE - 16, size=lengths.sum())
    with IndexWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), VOCAB_SIZE) as writer:
        writer.add_documents(tokens, lengths, numpy.ones(num_documents, numpy.int64))
    counts = IndexCounts(num_documents, 0, len(tokens), len(tokens), 0, {})
    dataclasses.replace(model, counts=counts, checksums=writer.checksums(), sources=[]).write(prefix)


def write_indices(options: BenchmarkOptions, num_files: int) -> None:
    """The first `num_files` indices, as far as they are missing, and a tokenizer."""
    first = options.folder / "corpus-0000"
    if not Manifest.path(first).exists():
        make_indices(options.folder, 1, num_documents=1)
    model = Manifest.read(first)
    folder = options.folder / "indices"
    folder.mkdir(exist_ok=True)
    missing = [number for number in range(num_files) if not Manifest.path(folder / f"{number:06}").exists()]
    with ThreadPoolExecutor(16) as threads:  # each manifest waits for the disk
        list(threads.map(lambda n: write_index(folder / f"{n:06}", model, options.documents, n), missing))


def write_recipe(options: BenchmarkOptions, num_files: int) -> Path:
    """A run of a tiny model that reads every file about once; on random tokens where there are no files."""
    num_steps = max(1, num_files * options.documents * 100 // (BATCH * LENGTH))
    data = {"train": str(options.folder / "indices/*"), "cache_dir": str(options.folder / "cache")}
    recipe = {
        "run": {"output_dir": str(options.folder / "run")},
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": VOCAB_SIZE},
        "data": data if num_files else {"mock": True},
        "training": {
            "num_steps": num_steps,
            "dtype": "float32",
            "sequence_length": LENGTH,
            "global_batch_size": BATCH,
        },
        "optimizer": {"warmup_steps": 0},
        "logging": {"log_interval": 1, "tensorboard": False},
    }
    path = options.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(options: BenchmarkOptions, recipe: Path) -> dict[str, float]:
    """Start the program in a new run folder, and stop it after its first step."""
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    metrics, log = options.folder / "run/metrics.jsonl", options.folder / "log.txt"
    load = os.getloadavg()[0]
    with log.open("w") as output:
        began = time.monotonic()
        command = [sys.executable, "-m", "megatron_tpt.pretrain", str(recipe)]
        program = psutil.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
        while not (metrics.exists() and metrics.stat().st_size):
            if program.poll() is not None:
                sys.exit(f"the run ended before its first step:\n{log.read_text()}")
            time.sleep(0.01)
        seconds, used, memory = time.monotonic() - began, program.cpu_times(), program.memory_info().rss
        program.kill()
        program.wait()
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(used.user + used.system, 2),
        "memory_gb": round(memory / 1e9, 2),
        "load": round(load, 1),
    }


def measure(options: BenchmarkOptions) -> list[dict[str, Any]]:
    """The figures of all starts, printed as they come."""
    figures = []
    for num_files in (0, *options.files):
        write_indices(options, num_files)
        recipe = write_recipe(options, num_files)
        for _, kind in itertools.product(range(options.rounds), ("cold", "warm") if num_files else ("no files",)):
            if kind == "cold":
                shutil.rmtree(options.folder / "cache", ignore_errors=True)
            figures.append({"files": num_files, "start": kind, **start(options, recipe)})
            print(
                "{files:>6} files  {start:<8}  {seconds:>6} s  {cpu_s:>6} s of CPU, load {load}".format(**figures[-1])
            )
    return figures


def main() -> None:
    """Measure, print and write the figures."""
    options = parse(BenchmarkOptions)
    options.folder.mkdir(parents=True)
    try:
        write_json(options.output, {**measured_on(), "starts": measure(options)}, indent=1)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    run(main)
