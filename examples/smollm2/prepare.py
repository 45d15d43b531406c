"""GSM8K's training problems as chats: a question, and its worked answer with the number in a box. Or as problems for
reinforcement learning: a question, and the number alone.

python examples/smollm2/prepare.py --data DATA_DIR --output FILE --limit 600 [--problems]
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines

PROMPT = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""As the benchmark gsm8k asks."""
_CALCULATOR = re.compile(r"<<[^>]*>>")


@dataclass(frozen=True)
class PrepareOptions:
    """Where GSM8K is, and how much of it is taken."""

    data: Path
    """The folder with gsm8k_train.jsonl."""
    output: Path
    """The file of chats or problems to write, .jsonl."""
    limit: PositiveInt = 600
    """Take the first N problems."""
    problems: bool = False
    """Write problems, in place of chats."""


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """A conversation; the calculator's marks of the data set are omitted."""
    steps, _, number = _CALCULATOR.sub("", answer).rpartition("####")
    turns = {
        "user": PROMPT.replace("{question}", question),
        "assistant": f"{steps.strip()}\n\nThe answer is $\\boxed{{{number.strip()}}}$.",
    }
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def problem(question: str, answer: str) -> dict[str, str]:
    """A prompt and the number that answers it."""
    return {"prompt": PROMPT.replace("{question}", question), "answer": number_of(answer)}


def number_of(answer: str) -> str:
    """The number at the end of a worked answer, without commas."""
    return answer.rpartition("####")[2].strip().replace(",", "")


def main() -> None:
    options = parse(PrepareOptions, description=__doc__)
    path = options.data / "gsm8k_train.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that holds GSM8K as JSONL")
    with path.open(encoding="utf-8") as file:
        rows = map(json.loads, itertools.islice(file, options.limit))
        make = problem if options.problems else chat
        write_json_lines(options.output, (make(row["question"], row["answer"]) for row in rows))


if __name__ == "__main__":
    run(main)
