"""How long the data part of a start-up takes: many documents in one index, and many index files in one blend.

python benchmarks/sample_index.py --documents 50000000 --files 2000 --output benchmarks/results/sample_index.json

The indices are synthetic: log-normal document lengths, real .idx and .json, .bin with holes instead of tokens. Each
phase is a separate process, so that its peak memory is its own (`imports_gb` of it are the imports). `cold`
reads the recipe, checks the manifests and builds the sample indices; `warm` does the same and finds them built.
"""

import itertools
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_tpt.config.cli import parse
from megatron_tpt.files import write_json

FINGERPRINT = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Options:
    """What to measure."""

    documents: int = 50_000_000
    """Documents of the one large index."""
    files: int = 2000
    """Index files of the blend."""
    documents_per_file: int = 1000
    """Documents of each of them."""
    epochs: tuple[float, ...] = (0.9, 3.5)
    """Epochs over the large index."""
    blend_samples: int = 1_000_000
    """Samples drawn from the blend."""
    sequence_length: int = 4096
    """Tokens per sample."""
    megatron: bool = False
    """Also build the large index's samples with Megatron Core's own GPTDataset."""
    folder: Path = Path(tempfile.gettempdir()) / "sample-index-benchmark"
    """Where the synthetic data goes; removed at the end."""
    output: Path | None = None
    """Write the figures here as JSON."""


def write_index(prefix: Path, num_documents: int, seed: int) -> int:
    """A synthetic index and its manifest. Returns its number of tokens."""
    from megatron_tpt.indexing.manifest import IndexCounts, Manifest, ThinkTokens, TokenizerInfo
    from megatron_tpt.indexing.writer import HEADER, MAGIC, VERSION

    lengths = numpy.random.default_rng(seed).lognormal(6.0, 1.0, num_documents).astype("<i4") + 1
    offsets = numpy.zeros(num_documents, dtype="<i8")
    numpy.cumsum(2 * lengths[:-1].astype("<i8"), out=offsets[1:])
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, num_documents, num_documents + 1))
        for array in (lengths, offsets, numpy.arange(num_documents + 1, dtype="<i8")):
            array.tofile(file)
    num_tokens = int(lengths.sum(dtype=numpy.int64))
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * num_tokens)
    Manifest(
        tokenizer=TokenizerInfo("tokenizer", FINGERPRINT, 32_000, 0),
        think=ThinkTokens([1], [2]),
        join="document_thinking",
        text_column="text",
        dtype="uint16",
        sources=[],
        counts=IndexCounts(num_documents, 0, num_tokens, num_tokens, 0, {}),
        checksums={"bin": f"sha256:{seed:064x}", "idx": f"sha256:{seed:064x}"},
        command=[],
    ).write(prefix)
    return num_tokens


def build_with_megatron(options: Options, prefix: Path, num_samples: int, cache: Path) -> None:
    """The same with Megatron Core's own classes."""
    from types import SimpleNamespace

    import megatron_tpt.platform  # noqa: F401

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=options.sequence_length,
        blend_per_split=[([str(prefix)], [1.0]), None, None],
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=0, vocab_size=32_000, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], lambda: True, config).build()


def measure(name: str, phase: Callable[[], object]) -> dict[str, object]:
    """Run `phase` in a forked process, after the imports: seconds, and the peak of its memory in GB."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        import megatron_tpt.training.data  # noqa: F401

        imported_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        started = time.monotonic()
        phase()
        seconds = time.monotonic() - started
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        measured = {"seconds": round(seconds, 2), "peak_gb": round(peak_gb, 2), "imports_gb": round(imported_gb, 2)}
        os.write(writing, json.dumps(measured).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        content = pipe.read()
    if os.waitpid(child, 0)[1] or not content:
        sys.exit(f"{name} failed")
    figures = {"phase": name, **json.loads(content), "load": round(os.getloadavg()[0], 1)}
    print("{phase:<44} {seconds:>8.2f} s {peak_gb:>6.2f} GB   (load {load})".format(**figures), flush=True)
    return figures


def measure_documents(options: Options) -> list[dict[str, object]]:
    """One index of many documents."""
    prefix, cache = options.folder / "large", options.folder / "cache-large"
    num_tokens = write_index(prefix, options.documents, 0)
    print(f"{options.documents:,} documents, {num_tokens:,} tokens")
    results = []
    for epochs in options.epochs:
        num_samples = int(epochs * num_tokens / options.sequence_length)
        name = f"{options.documents:,} documents, {epochs} epochs"
        start = lambda n=num_samples: start_data(options, [prefix], n, cache)  # noqa: E731
        results += [measure(f"{name}: {kind}", start) for kind in ("cold", "warm")]
        if options.megatron:
            other = options.folder / "cache-megatron"
            build = lambda n=num_samples, other=other: build_with_megatron(options, prefix, n, other)  # noqa: E731
            results += [measure(f"{name}: Megatron Core {kind}", build) for kind in ("cold", "warm")]
            shutil.rmtree(other)
        shutil.rmtree(cache)
    return results


def start_data(options: Options, prefixes: list[Path], num_samples: int, cache: Path) -> None:
    """What the first process of a machine does with its data before the first step."""
    from megatron_tpt.config.load import recipe_from_dict
    from megatron_tpt.recipes.pretrain import PretrainRecipe
    from megatron_tpt.training.blend import cache_folder
    from megatron_tpt.training.pretrain_data import open_splits, prepare_cache
    from megatron_tpt.training.sample_cache import SampleCache

    training = {"num_steps": num_samples, "global_batch_size": 1, "sequence_length": options.sequence_length}
    data = {"train": [str(prefix) for prefix in prefixes], "cache_dir": str(cache)}
    recipe = recipe_from_dict(PretrainRecipe, {"training": training, "data": data})
    recipe = recipe.with_vocabulary(recipe.tokenizer())
    prepare_cache(recipe)
    open_splits(recipe, SampleCache(cache_folder(recipe)))[0][0]


def measure_files(options: Options) -> list[dict[str, object]]:
    """A blend of many index files."""
    prefixes = [options.folder / f"file-{number:05}" for number in range(options.files)]
    with ThreadPoolExecutor(16) as threads:  # each manifest waits for the disk
        list(threads.map(write_index, prefixes, itertools.repeat(options.documents_per_file), range(len(prefixes))))
    cache = options.folder / "cache-files"
    start = lambda: start_data(options, prefixes, options.blend_samples, cache)  # noqa: E731
    return [measure(f"{options.files:,} files: {kind}", start) for kind in ("cold", "warm")]


def main() -> None:
    options = parse(Options, description=__doc__)
    options.folder.mkdir(parents=True)
    try:
        results = measure_documents(options) + measure_files(options)
    finally:
        shutil.rmtree(options.folder)
    from importlib.metadata import version

    versions = {name: version(name) for name in ("megatron-core", "torch", "numpy")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if options.output:
        content = {"machine": machine, "versions": versions, "results": results}
        write_json(options.output, content, indent=1)


if __name__ == "__main__":
    main()
