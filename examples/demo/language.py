"""The demo's little language: parcels on the road, and the weekday on which each of them arrives.

    A parcel leaves on Mon: a+6 b+2 c+4 d+3 e+2 f+7 days.
    When does it arrive?
    Answer: Thu

Every leg of the way (a to f) takes one to seven days. The answer is a sum modulo 7, which can hardly be seen at once:
omit one leg, and every weekday is as likely as before. Leg by leg it is easy: find the next leg, count on.

    Mon a+6 Sun b+2 Tue c+4 Sat d+3 Tue e+2 Thu f+7 Thu

python examples/demo/language.py --output DIR writes documents.jsonl, sft.jsonl, sft_direct.jsonl and problems.jsonl.
No parcel is in two of the sets, nor twice in one.
"""

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
LEGS = "abcdef"
NUM_PARCELS = 7 ** len(LEGS)
# Every fourth parcel is the teacher's: what it writes about in the demo it has never seen.
TEACHERS_PARCELS = range(0, NUM_PARCELS, 4)
STUDENTS_PARCELS = [number for number in range(NUM_PARCELS) if number not in TEACHERS_PARCELS]


@dataclass(frozen=True)
class Parcel:
    """The days that each leg takes, from 1 to 7."""

    num_days: tuple[int, ...]

    @classmethod
    def from_document(cls, document: str) -> "Parcel":
        """The parcel that a document describes."""
        return cls(tuple(int(num_days) for num_days in re.findall(r"\+(\d)", document)))

    @property
    def legs(self) -> list[str]:
        """The legs as words: a+6."""
        return [f"{leg}+{num_days}" for leg, num_days in zip(LEGS, self.num_days, strict=True)]

    @property
    def stops(self) -> list[str]:
        """The weekday after each leg."""
        return [DAYS[total % 7] for total in itertools.accumulate(self.num_days)]

    @property
    def question(self) -> str:
        """The facts and the question, which ends its line."""
        return f"A parcel leaves on Mon: {' '.join(self.legs)} days.\nWhen does it arrive?\n"

    @property
    def answer(self) -> str:
        """The worked-out result, without a step."""
        return f"Answer: {self.stops[-1]}"

    @property
    def document(self) -> str:
        """A document of the corpus."""
        return self.question + self.answer

    @property
    def thinking(self) -> str:
        """The steps, as a solver writes them."""
        return " ".join(["Mon", *itertools.chain(*zip(self.legs, self.stops, strict=True))])


@dataclass(frozen=True)
class LanguageOptions:
    """How much of the language to write, and where to."""

    output: Path
    """The folder for documents.jsonl, sft.jsonl, sft_direct.jsonl and problems.jsonl."""
    num_documents: int = 32000
    """Documents of the corpus."""
    num_sft: int = 1024
    """Examples for fine-tuning."""
    num_problems: int = 300
    """Held-out problems."""
    seed: int = 0
    """Decides which parcels there are."""

    def __post_init__(self) -> None:
        if min(self.num_documents, self.num_sft, self.num_problems) < 1:
            raise UserError("--num-documents, --num-sft and --num-problems must be 1 or more")
        if self.num_documents + self.num_sft + self.num_problems > len(STUDENTS_PARCELS):
            raise UserError(f"there are only {len(STUDENTS_PARCELS):,} parcels: ask for fewer documents")


def sample_parcels(population: Sequence[int], num_parcels: int, seed: int) -> list[Parcel]:
    """Different parcels out of a population, at random."""
    numbers = random.Random(seed).sample(population, num_parcels)
    return [Parcel(tuple(1 + number // 7**place % 7 for place in range(len(LEGS)))) for number in numbers]


def check_disjoint(sets: dict[str, Iterable[str]]) -> None:
    """Raise RuntimeError when a question is in two of the named sets, or twice in one."""
    place: dict[str, str] = {}
    for name, questions in sets.items():
        for question in questions:
            if question in place:
                raise RuntimeError(f"the same parcel is in {place[question]} and {name}: {question!r}")
            place[question] = name


def write_language(options: LanguageOptions) -> None:
    """Write the four files, then read them back and check that no parcel is in two sets."""
    num_parcels = options.num_documents + options.num_sft + options.num_problems
    parcels = iter(sample_parcels(STUDENTS_PARCELS, num_parcels, options.seed))
    # The problems come first: they stay the same when the corpus grows.
    problems = list(itertools.islice(parcels, options.num_problems))
    examples = list(itertools.islice(parcels, options.num_sft))
    write_json_lines(
        options.output / "problems.jsonl", ({"prompt": p.question, "answer": p.stops[-1]} for p in problems)
    )
    write_json_lines(
        options.output / "sft.jsonl",
        ({"prompt": p.question, "response": f"<think>\n{p.thinking}\n</think>\n{p.answer}"} for p in examples),
    )
    write_json_lines(
        options.output / "sft_direct.jsonl", ({"prompt": p.question, "response": p.answer} for p in examples)
    )
    write_json_lines(options.output / "documents.jsonl", ({"text": p.document} for p in parcels))
    check_disjoint(
        {
            "problems": (row["prompt"] for row in read_rows(options.output / "problems.jsonl")),
            "fine-tuning": (row["prompt"] for row in read_rows(options.output / "sft.jsonl")),
            "documents": (row["text"].partition("Answer:")[0] for row in read_rows(options.output / "documents.jsonl")),
        }
    )


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of one of the files."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    run(lambda: write_language(parse(LanguageOptions, description=__doc__)))
