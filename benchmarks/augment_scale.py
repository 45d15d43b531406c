"""How tools/augment.py behaves on a large input: memory of the driver, and how soon it resumes a nearly done job.

python benchmarks/augment_scale.py --folder SCRATCH [--input-gb 5] [--num-finished 1000000] [--parts memory]

Memory: the whole job over `--input-gb` of documents (50 KB each, one in a thousand of 1 MB), sent to a local server
that answers at once, so that the driver and not a model is measured. Peak resident memory of the driver.

Resuming: a job with `--num-finished` finished records, written by the job's own code, lacks its last block. Seconds
from the start of the program to the first request. Writes benchmarks/results/augment_scale.json; removes what it made.
"""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json

RESULTS = Path(__file__).parent / "results"
TOOL = Path(__file__).parents[1] / "tools" / "augment.py"
ANSWER = "The passage says first what it is about, then why one would care, and ends with a figure to remember."
SENTENCE = "in the beginning of every year a ferry with copper rods leaves for some other quay and comes back late"


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and where there is room for it."""

    folder: Path
    """A folder for scratch files; it needs twice the input's size."""
    input_gb: float = 5.0
    num_finished: int = 1_000_000
    parts: tuple[Literal["resuming", "memory"], ...] = ("resuming", "memory")
    """What to measure; the figures of the other part stay as they are."""


async def serve(port: int) -> None:
    """A server of chat completions that has its answer ready, and reports when the first request came."""
    body = json.dumps(
        {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 2048, "completion_tokens": 24, "total_tokens": 2072},
        }
    ).encode()
    models = json.dumps({"object": "list", "data": [{"id": "ready", "object": "model"}]}).encode()
    first = True

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            await reader.readexactly(length)
            content = body if head.startswith(b"POST") else models
            if head.startswith(b"POST") and first:
                first = False
                print(time.time(), flush=True)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(content) + content)
            await writer.drain()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


def write_documents(path: Path, num_bytes: int) -> int:
    """Documents of 50 KB, one in a thousand of 1 MB; returns how many."""
    written = number = 0
    with path.open("w") as file:
        while written < num_bytes:
            size = 1_000_000 if number % 1000 == 999 else 50_000
            text = f"{SENTENCE[number % 7 :]} {number} "
            written += file.write(json.dumps({"text": text * (size // len(text))}) + "\n")
            number += 1
    return number


def command(data: Path, output: Path, port: int) -> list[str]:
    return [
        *(sys.executable, str(TOOL), "--input", str(data), "--output", str(output), "--model", "ready"),
        *("--engine", "endpoint", "--api", "chat", "--endpoints", f"http://127.0.0.1:{port}/v1"),
    ]


def measure_memory(options: BenchmarkOptions, port: int) -> dict[str, Any]:
    data, output = options.folder / "large.jsonl", options.folder / "large"
    num_documents = write_documents(data, int(options.input_gb * 1e9))
    start = time.monotonic()
    subprocess.run(command(data, output, port), check=True)
    seconds = time.monotonic() - start
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    data.unlink()
    shutil.rmtree(output)
    return {
        "input_gb": options.input_gb,
        "documents": num_documents,
        "seconds": round(seconds, 1),
        "driver_peak_mib": round(peak_kib / 1024),
    }


def make_finished(options: BenchmarkOptions, data: Path, output: Path, port: int) -> None:
    """A job that lacks its last block, made by the job's own code."""
    from dataclasses import asdict

    from megatron_tpt.jobs.settings import write_settings
    from megatron_tpt.records import Record, content_id
    from megatron_tpt.thinking.job import plan
    from megatron_tpt.thinking.journal import Line
    from megatron_tpt.thinking.ledger import Ledger
    from megatron_tpt.thinking.options import AugmentOptions
    from megatron_tpt.thinking.shards import SETTINGS_NAME, Output, block_name

    with data.open("w") as file:
        for number in range(options.num_finished + 10):
            file.write(json.dumps({"text": f"Document {number}: " + SENTENCE * 8}) + "\n")
    job = AugmentOptions(
        input=[str(data)],
        output=output,
        model="ready",
        engine="endpoint",
        api="chat",
        endpoints=[f"http://127.0.0.1:{port}/v1"],
    )
    planned = plan(job)
    write_settings(output / SETTINGS_NAME, planned.settings)
    folder, ledger = Output(output), Ledger(Output(output).ledgers, 0, 0)
    with data.open() as file:
        for block in range(options.num_finished // 1000):
            name = block_name(0, block)
            journal = folder.journal(name)
            assert journal is not None  # nothing else works in this folder
            for row in range(block * 1000, block * 1000 + 1000):
                text = json.loads(next(file))["text"]
                meta = {"document_tokens": 300, "thinking_tokens": 24, "prompt_tokens": 400, "truncated": False}
                record = Record(content_id(text), text, ANSWER * 10, meta)
                journal.add(Line(row, record.id, [asdict(record)], []))
            folder.finish(name, journal, ledger, generator_s=1.0)


def measure_resuming(options: BenchmarkOptions, port: int, server: subprocess.Popen[str]) -> dict[str, Any]:
    data, output = options.folder / "many.jsonl", options.folder / "many"
    make_finished(options, data, output, port)
    start = time.time()
    subprocess.run(command(data, output, port), check=True)
    assert server.stdout
    first_request = float(server.stdout.readline())
    whole = time.time() - start
    result = {
        "finished_records": options.num_finished,
        "start_to_first_request_s": round(first_request - start, 2),
        "whole_run_s": round(whole, 2),
    }
    data.unlink()
    shutil.rmtree(output)
    return result


def start_server(port: int) -> subprocess.Popen[str]:
    script = f"import asyncio, runpy; m = runpy.run_path({__file__!r}); asyncio.run(m['serve']({port}))"
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline() == "ready\n"
    return server


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = RESULTS / "augment_scale.json"
    summary: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for port, name in enumerate(options.parts, start=18421):
        server = start_server(port)
        load = os.getloadavg()[0]
        try:
            figures = measure_memory(options, port) if name == "memory" else measure_resuming(options, port, server)
        finally:
            server.kill()
        summary[name] = figures | {"load": round(load, 2)}
        print(json.dumps({name: summary[name]}), flush=True)
        RESULTS.mkdir(exist_ok=True)
        write_json(output, summary, indent=1)


if __name__ == "__main__":
    run(main)
