"""The two files this example needs in addition to GSM8K's own: the documents that stay plain, and the SFT examples.

python examples/gsm8k/prepare.py --data DATA_DIR --output OUTPUT_DIR --num-augmented 500
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines


@dataclass(frozen=True)
class PrepareOptions:
    """Where GSM8K is, and how much of it gets thinking."""

    data: Path
    """The folder with gsm8k_train.jsonl."""
    output: Path
    """The folder for plain.jsonl and sft.jsonl."""
    num_augmented: int = 500
    """Documents, from the first on, that get thinking; the others stay plain."""


def rows(path: Path) -> Iterator[dict[str, str]]:
    """GSM8K's rows: `question`, and `answer` with its worked steps and "#### NUMBER" at the end."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that holds GSM8K as JSONL")
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def main() -> None:
    options = parse(PrepareOptions, description=__doc__)
    train = list(rows(options.data / "gsm8k_train.jsonl"))
    write_json_lines(options.output / "plain.jsonl", train[options.num_augmented :])
    write_json_lines(
        options.output / "sft.jsonl",
        ({"prompt": f"{row['question']}\n", "response": row["answer"]} for row in train),
    )


if __name__ == "__main__":
    run(main)
