"""How fast a corpus is curated beside cleaning it, and whether memory stays bounded.

python benchmarks/curation.py --rows 1000000 --output benchmarks/results/curation.json

The case is synthetic: rows of a question and an answer of 60 to 400 made-up words with formulas, one in ten occurring
twice, half in each of two data sets. What is measured, each as a user would run it:

    prepare    tools/prepare.py: reads, drops bad rows and exact duplicates, writes
    same       tools/curate.py with the same work: no annotations, no strata; it names the data sets of each document
    rules      the same, domain and reasoning intensity, five strata, one of them with a size
    lengths    the same, and tokens of question, answer and thoughts by a tokenizer

Seconds are those of the whole process, start-up included; `cpu_s` is the processor time of it and its workers, which
other work on the machine changes less. `times_prepare` and `times_prepare_cpu` compare both with the mean of two runs
of tools/prepare.py, before and after. Peak memory is that of the process and its workers together, sampled ten times a
second; of a tenth of the rows too, to show whether it grows.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
from random_corpus import measured_on

from megatron_tpt.config.cli import parse
from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
NUM_FILES = 8
STRATA = """\
ldq: {where: "'ldq' in datasets"}
shq: {where: "'shq' in datasets"}
lmq: {any_of: [ldq, shq]}
math: {of: ldq, where: domain == 'math' and reasoning_intensity > 1}
some: {of: lmq, documents: 10000}
"""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rows: int = 1_000_000
    """Rows of the case."""
    scratch: Path = Path(tempfile.gettempdir())
    """Where the data goes; removed at the end."""
    output: Path | None = None
    """Write the figures here as JSON."""


def write_case(folder: Path, num_rows: int) -> int:
    """Write the case, and return its bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklm", k=draw.randint(2, 9))) for _ in range(20_000)]
    words += ["therefore", "so", "equation", "let", "x", "\\frac{1}{2}", "= 4", "return"] * 400
    folder.mkdir()
    before: list[bytes] = []
    for number in range(NUM_FILES):
        with (folder / f"{'ldq' if number % 2 else 'shq'}-{number}.jsonl").open("wb") as file:
            for row in range(num_rows // NUM_FILES):
                if before and draw.random() < 0.1:
                    line = before[draw.randrange(len(before))]
                else:
                    answer = " ".join(draw.choices(words, k=draw.randint(60, 400)))
                    line = orjson.dumps({"question": " ".join(draw.choices(words, k=20)), "answer": answer}) + b"\n"
                if row < 1000:
                    before.append(line)
                file.write(line)
    return sum(path.stat().st_size for path in folder.iterdir())


def run(command: list[Any]) -> dict[str, float]:
    """Seconds, processor time and peak memory, the process and its workers together, of a command that must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), env=environment)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                parent = psutil.Process(process.pid)
                used = sum(each.memory_info().rss for each in (parent, *parent.children(recursive=True)))
            except psutil.Error:
                used = 0
            peak = max(peak, used)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    watcher.join()
    if code:
        raise SystemExit(f"{command[1]} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_gb": peak / 1e9}


def measure(folder: Path, num_rows: int) -> dict[str, Any]:
    """The jobs on a case of `num_rows` rows."""
    source = folder / f"case-{num_rows}"
    num_bytes = write_case(source, num_rows)
    tokenizer, strata = folder / "tokenizer", folder / "strata.yaml"
    strata.write_text(STRATA)
    if not tokenizer.exists():
        first: list[str | Path] = [*sorted(source.iterdir())[:1]]
        train_tokenizer(TrainTokenizerOptions(first, tokenizer, text_column="answer", vocab_size=4096))
    inputs = [f"{name}={source}/{name}-*.jsonl:question,answer" for name in ("ldq", "shq")]
    curate = [sys.executable, ROOT / "tools/curate.py", "--input", *inputs]
    rules = [*curate, "--strata", strata, "--annotate", "domain", "reasoning"]
    prepare = [sys.executable, ROOT / "tools/prepare.py", "--input", source, "--text-column", "question,answer"]
    commands = {
        "prepare": prepare,
        "same": [*curate, "--annotate"],
        "rules": rules,
        "lengths": [*rules, "lengths", "--tokenizer", tokenizer],
        "prepare_again": prepare,
    }
    found: dict[str, Any] = {"rows": num_rows, "input_mb": num_bytes / 1e6, "load_average": os.getloadavg()[0]}
    for name, command in commands.items():
        figures = run([*command, "--output", folder / f"{name}-{num_rows}"])
        found[name] = figures | {"rows_per_s": num_rows / figures["seconds"]}
    for figure, ratio in (("seconds", "times_prepare"), ("cpu_s", "times_prepare_cpu")):
        prepare_s = (found["prepare"][figure] + found["prepare_again"][figure]) / 2
        for name in ("same", "rules", "lengths"):
            found[name][ratio] = found[name][figure] / prepare_s
    return found


def main() -> None:
    options = parse(Options, description=__doc__)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        figures = {size: measure(folder, rows) for size, rows in (("tenth", options.rows // 10), ("all", options.rows))}
    result = figures | measured_on()
    print(json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
