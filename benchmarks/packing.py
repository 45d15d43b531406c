"""What packing conversations costs: by the number of turns at the same number of words, and by worker processes.

python benchmarks/packing.py [--words 500000] [--tokenizer TOKENIZER_DIR]

Every input holds the same number of words in messages of the same length; they differ in the messages of a conversation
(4, 16, 80, 320). CPU seconds are those of the whole command tools/pack_sft.py and its workers, less those of the same
command on one conversation: what a word costs, without imports. Then the input of 16 messages, 8 times as large, is
packed by 1 worker and by 4, whose files must be the same bytes. Writes benchmarks/results/packing.json.
"""

import json
import os
import platform as machine
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import write_json

ROOT = Path(__file__).parents[1]
MESSAGES = (4, 16, 80, 320)
WORDS_PER_MESSAGE = 60
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is packed."""

    words: int = 500_000
    """Words of every input; of that for the workers eight times as many."""
    tokenizer: Path | None = None
    """The tokenizer folder, with a chat template; when not given, one of 4,000 tokens is trained."""
    output: Path = ROOT / "benchmarks" / "results" / "packing.json"
    """Where the figures go."""


def write_chats(path: Path, num_words: int, num_messages: int) -> Path:
    """Conversations of `num_messages` messages with `num_words` words in all."""
    words = [f"{begin}{end}" for begin in ("al", "be", "ga", "de", "ep", "ze") for end in ("pha", "ta", "ma", "lon")]
    rng = random.Random(num_messages)
    with path.open("w") as file:
        for _ in range(max(1, num_words // (WORDS_PER_MESSAGE * num_messages))):
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": " ".join(rng.choices(words, k=WORDS_PER_MESSAGE))}
                for i in range(num_messages)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_tokenizer(folder: Path) -> Path:
    """A small tokenizer with the tokens of ChatML."""
    from megatron_tpt.indexing.options import TrainTokenizerOptions
    from megatron_tpt.indexing.train_tokenizer import train_tokenizer

    texts, template = folder / "texts.jsonl", folder / "chat.jinja"
    template.write_text(TEMPLATE)
    chats = write_chats(folder / "chats.jsonl", 20_000, 4).read_text().splitlines()
    texts.write_text("".join(json.dumps({"text": json.loads(line)["messages"][0]["content"]}) + "\n" for line in chats))
    return train_tokenizer(
        TrainTokenizerOptions(
            input=[texts],
            output=folder / "tokenizer",
            vocab_size=4000,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            chat_template=template,
        )
    )


def pack(chats: Path, tokenizer: Path, num_workers: int) -> dict[str, Any]:
    """Seconds, CPU seconds and checksums of packing a file."""
    prefix = chats.with_name(f"{chats.stem}-{num_workers}")
    options = {"input": chats, "tokenizer": tokenizer, "output": prefix, "sequence-length": 65536}
    command = [sys.executable, str(ROOT / "tools" / "pack_sft.py"), "--num-workers", str(num_workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, *(f"--{name}={value}" for name, value in options.items())], check=True, cwd=ROOT)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    manifest = json.loads(Path(f"{prefix}.sft.json").read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "tokens": manifest["counts"]["tokens"],
        "checksums": manifest["checksums"],
    }


def by_turns(folder: Path, tokenizer: Path, num_words: int, start_cpu_s: float) -> list[dict[str, Any]]:
    """What the same words cost in longer and longer conversations."""
    rows = []
    for num_messages in MESSAGES:
        figures = pack(write_chats(folder / f"turns{num_messages}.jsonl", num_words, num_messages), tokenizer, 1)
        cpu_s = figures["cpu_seconds"] - start_cpu_s
        rows.append({"messages": num_messages, "cpu_seconds": cpu_s, "tokens": figures["tokens"]})
        print(
            f"{num_messages:4} messages a conversation: {cpu_s:6.2f} CPU s, {figures['tokens'] / cpu_s:10,.0f} tokens/s"
        )
    return rows


def by_workers(folder: Path, tokenizer: Path, num_words: int) -> list[dict[str, Any]]:
    """What workers gain; the bytes are the same."""
    chats = write_chats(folder / "workers.jsonl", 8 * num_words, 16)
    rows = [{"workers": number, **pack(chats, tokenizer, number)} for number in (1, 4)]
    checksums = [row.pop("checksums") for row in rows]
    if checksums[0] != checksums[1]:
        raise RuntimeError("four workers have packed other bytes than one")
    for row in rows:
        print(f"{row['workers']} workers: {row['seconds']:6.2f} s, {row['tokens'] / row['seconds']:10,.0f} tokens/s")
    print(f"4 workers take {rows[1]['seconds'] / rows[0]['seconds']:.2f} of the time of one, for the same bytes")
    return rows


def main() -> None:
    """Measure, print and write the figures."""
    options = parse(BenchmarkOptions, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = options.tokenizer or make_tokenizer(folder)
        start_cpu_s = pack(write_chats(folder / "start.jsonl", 1, 2), tokenizer, 1)["cpu_seconds"]
        figures: dict[str, Any] = {
            "words": options.words,
            "start_cpu_seconds": start_cpu_s,
            "by_turns": by_turns(folder, tokenizer, options.words, start_cpu_s),
            "by_workers": by_workers(folder, tokenizer, options.words),
            "load_average": os.getloadavg()[0],
            "versions": {name: version(name) for name in ("tokenizers", "transformers")},
            "machine": {
                "processor": machine.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "python": machine.python_version(),
            },
        }
    write_json(options.output, figures, indent=1)


if __name__ == "__main__":
    run(main)
