"""How fast text becomes an index, compared with Megatron's own builder; and whether memory stays bounded on large
input.

python benchmarks/indexing.py --data gsm8k_train.jsonl --output benchmarks/results/indexing.json
python benchmarks/indexing.py --data gsm8k_train.jsonl --size-gb 10 --output benchmarks/results/indexing_large.json

The case is GSM8K's 7,473 training documents 12 times, every copy with other digits and a heading: 49.8 MB, 89,676
documents, and a tokenizer of 16,384 tokens trained on it. The programs take turns; each figure is the median of the
rounds. `tokens_per_s` is from the first byte read to the last file synced and named, by the program's own clock;
`startup_s` is the rest of the whole process. With `--size-gb` the documents are repeated, with ever other digits,
to this many gigabytes; peak memory is that of the process and its children, and the disk's speed is measured as well.
"""

import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse

ROOT = Path(__file__).parents[1]
NUM_COPIES = 12
NUM_FILES = 10
PEER = """
import json, sys, time
import numpy
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
source, folder, prefix = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.encode_special_tokens = True
eos = tokenizer.token_to_id("<|endoftext|>")
started = time.perf_counter()
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size()))
num_tokens = 0
with open(source, "rb") as lines:
    for line in lines:
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids + [eos]
        builder.add_document(numpy.asarray(ids), [len(ids)])
        num_tokens += len(ids)
builder.finalize(f"{prefix}.idx")
print(json.dumps({"tokens": num_tokens, "work_s": time.perf_counter() - started}))
"""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data: Path
    """GSM8K's training problems, JSONL with `question` and `answer`."""
    size_gb: float | None = None
    """Index this many gigabytes (10^9 bytes) instead of the small case; the peer is omitted."""
    kills: int = 5
    """With `--size-gb`: kill -9 at this many random moments in a second run."""
    rounds: int = 5
    """How often each program runs; the peer, which is slow, once in two rounds."""
    megatron: Path | None = None
    """A checkout of Megatron-LM, to run its tools/preprocess_data.py too."""
    scratch: Path = Path(tempfile.gettempdir())
    """Where the data goes; removed at the end. It needs three times the size."""
    output: Path | None = None
    """Write the figures here as JSON."""


def write_documents(data: Path, target: Path) -> int:
    """Write the case, and return the number of bytes of its text."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    rng = random.Random(0)
    num_text_bytes = copy = 0
    with target.open("w", encoding="utf-8") as file:
        while copy < NUM_COPIES:
            digits = "".join(rng.choices("0123456789", k=1 << 16))
            for number, text in enumerate(texts):
                offset = rng.randrange(1 << 15)
                places = iter(range(offset, len(digits)))
                varied = re.sub(r"\d", lambda _: digits[next(places)], text)  # noqa: B023
                varied = f"Problem set {copy % 100:02d}, exercise {number:05d}.\n{varied}"
                num_text_bytes += len(varied.encode())
                file.write(json.dumps({"text": varied}, ensure_ascii=False) + "\n")
            copy += 1
    return num_text_bytes


def write_large(case: Path, folder: Path, num_bytes: int) -> None:
    """Write `num_bytes` bytes in `NUM_FILES` files: the case repeated, with ever other digits."""
    content, rng = case.read_bytes(), random.Random(0)
    folder.mkdir()
    for number in range(NUM_FILES):
        with (folder / f"{number:02d}.jsonl").open("wb") as file:
            while file.tell() < num_bytes // NUM_FILES:
                digits = b"0123456789"
                file.write(content.translate(bytes.maketrans(digits, bytes(rng.sample(digits, len(digits))))))


def run(command: list[Any]) -> tuple[str, float, float]:
    """(its output, seconds, peak memory in GB of it and its children) of a command that must succeed."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{command[1]} failed:\n{text}")
    return text, seconds, usage.ru_maxrss / 1e6


def run_ours(source: Path, tokenizer: Path, prefix: Path) -> dict[str, float]:
    """One run of tools/index.py on an output that is not there."""
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    text, seconds, peak_gb = run(
        [sys.executable, ROOT / "tools" / "index.py", "--input", source, "--tokenizer", tokenizer, "--output", prefix]
    )
    match = re.search(r" ([\d,]+) tokens \(.* in ([\d.]+) s$", text, re.MULTILINE)
    assert match, text
    tokens, work_s = int(match[1].replace(",", "")), float(match[2])
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / work_s,
        "work_s": work_s,
        "startup_s": seconds - work_s,
        "process_s": seconds,
        "peak_gb": peak_gb,
    }


def run_peer(source: Path, tokenizer: Path, prefix: Path) -> dict[str, float]:
    """One run of Megatron Core's builder, fed by Hugging Face tokenizers in one process."""
    text, seconds, _ = run([sys.executable, "-c", PEER, source, tokenizer, prefix])
    figures = json.loads(re.findall(r"^\{.*\}$", text, re.MULTILINE)[-1])
    work_s = figures["work_s"]
    return {
        "tokens": figures["tokens"],
        "tokens_per_s": figures["tokens"] / work_s,
        "work_s": work_s,
        "startup_s": seconds - work_s,
        "process_s": seconds,
    }


def run_preprocess_data(megatron: Path, source: Path, tokenizer: Path, prefix: Path, num_tokens: int) -> dict:
    """One run of Megatron-LM's tools/preprocess_data.py: it has no clock of its own, start-up is in it."""
    _, seconds, _ = run(
        [
            *[sys.executable, megatron / "tools" / "preprocess_data.py", "--input", source, "--json-keys", "text"],
            *["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"],
            *["--output-prefix", prefix, "--workers", os.cpu_count()],
        ]
    )
    return {"process_s": seconds, "tokens_per_s_with_startup": num_tokens / seconds}


def medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The median of every figure, and each run's rate."""
    figures: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return figures | {"runs": [round(run["tokens_per_s"]) for run in runs]}


def disk_mb_per_s(folder: Path, num_bytes: int) -> float:
    """How fast zeros can be written and synced."""
    path = folder / "zeros"
    block = bytes(8 << 20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return num_bytes / 1e6 / seconds


def train_tokenizer(source: Path, target: Path) -> None:
    """The 16k tokenizer of the case."""
    command = [sys.executable, ROOT / "tools" / "train_tokenizer.py", "--input", source, "--output", target]
    run([*command, "--vocab-size", 16384, "--no-split-digits"])


def small_case(options: Options, folder: Path) -> dict[str, Any]:
    """Ours and the peers on the 49.8 MB."""
    source, tokenizer = folder / "case.jsonl", folder / "tokenizer"
    num_text_bytes = write_documents(options.data, source)
    train_tokenizer(source, tokenizer)
    ours, peer, loads = [], [], []
    run_ours(source, tokenizer, folder / "ours")  # bytecode and page cache
    for number in range(options.rounds):
        loads.append(os.getloadavg()[0])
        ours.append(run_ours(source, tokenizer, folder / "ours"))
        if number % 2 == 0:
            peer.append(run_peer(source, tokenizer, folder / "peer"))
    built = [[(folder / f"{name}.{kind}").read_bytes() for kind in ("bin", "idx")] for name in ("ours", "peer")]
    same = built[0] == built[1]
    result: dict[str, Any] = {"ours": medians(ours), "megatron_builder": medians(peer), "byte_identical": same}
    if options.megatron:
        prefix = folder / "preprocessed"
        result["preprocess_data"] = run_preprocess_data(
            options.megatron, source, tokenizer, prefix, int(ours[0]["tokens"])
        )
    ratio = result["ours"]["tokens_per_s"] / result["megatron_builder"]["tokens_per_s"]
    return {
        "text_mb": num_text_bytes / 1e6,
        **result,
        "ratio": ratio,
        "load_average_before_each_round": loads,
    }


def large_case(options: Options, folder: Path, size_gb: float) -> dict[str, Any]:
    """Ours on `size_gb` gigabytes, between two measurements of the disk; then again, killed on the way."""
    case, source, tokenizer = folder / "case.jsonl", folder / "large", folder / "tokenizer"
    write_documents(options.data, case)
    train_tokenizer(case, tokenizer)
    small = medians([run_ours(case, tokenizer, folder / "small") for _ in range(3)])
    write_large(case, source, int(size_gb * 1e9))
    input_bytes = sum(path.stat().st_size for path in source.iterdir())
    load = os.getloadavg()[0]
    disk = [disk_mb_per_s(folder, 2 << 30)]
    figures = run_ours(source, tokenizer, folder / "whole")
    disk.append(disk_mb_per_s(folder, 2 << 30))
    written = sum((folder / f"whole.{kind}").stat().st_size for kind in ("bin", "idx"))
    result = {
        "input_gb": input_bytes / 1e9,
        "large": figures,
        "input_mb_per_s": input_bytes / 1e6 / figures["work_s"],
        "written_mb_per_s": written / 1e6 / figures["work_s"],
        "disk_write_mb_per_s": disk,
        "small_tokens_per_s": small["tokens_per_s"],
        "large_by_small": figures["tokens_per_s"] / small["tokens_per_s"],
        "load_average": load,
    }
    return result | killed_on_the_way(options, folder, figures["process_s"])


def killed_on_the_way(options: Options, folder: Path, whole_s: float) -> dict[str, Any]:
    """Index the large case again with kill -9 at random moments; are the checksums those of the whole run?"""
    chance = random.Random(time.time_ns())
    checksums = json.loads((folder / "whole.json").read_text())["checksums"]
    for kind in ("bin", "idx", "json"):
        (folder / f"whole.{kind}").unlink()
    command = [sys.executable, ROOT / "tools" / "index.py", "--input", folder / "large"]
    command += ["--tokenizer", folder / "tokenizer", "--output", folder / "killed"]
    moments = []
    for _ in range(options.kills):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moments.append(chance.uniform(1, whole_s / 2))
        try:
            process.wait(moments[-1])
            break  # it was done before
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, seconds, _ = run(command)
    same = json.loads((folder / "killed.json").read_text())["checksums"] == checksums
    return {"killed_after_s": moments, "last_run_s": seconds, "same_checksums_after_kills": same}


def _processor() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def main() -> None:
    options = parse(Options, description=__doc__)
    options.scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="indexing-benchmark-", dir=options.scratch))
    try:
        figures = large_case(options, folder, options.size_gb) if options.size_gb else small_case(options, folder)
    finally:
        shutil.rmtree(folder)
    names = ("gigatoken", "tokenizers", "pyarrow", "numpy", "megatron-core")
    machine = f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    report = {"machine": machine, "versions": {name: version(name) for name in names}, **figures}
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
