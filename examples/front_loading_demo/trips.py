"""The miniature's little language: trips around four rings of words, and the word at which each of them ends.

    Mon a+3 b+1 c+5 d+2 e+2 f+4 ?
    Mon a+3 Thu b+1 Fri c+5 Fri d+2 Tue e+2 Thu f+4 Wed
    Answer: Wed

A leg takes a trip one to five places ahead around its ring of five words. Where a trip of six legs ends can hardly be
seen at once: omit one leg, and every word is as likely as before. Leg by leg it is easy: find the next leg, count on.
The rings share the legs and nothing else: what follows what is learned for each of them.

python examples/front_loading_demo/trips.py --output DIR writes

base.jsonl      documents without steps: trips of one to six legs and where they end, of all rings alike
ldq.jsonl       large, diverse, of mixed quality: all rings; half without steps, some with a leg misread
shq.jsonl       small, of high quality: every step, all right; mostly of one ring, and of one ring nothing
problems.jsonl  held out: as many of every ring
words.jsonl     every word, for a tokenizer

The hash of a question decides which of the sets a trip of six legs may be in.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines

RINGS = {
    "days": ("Mon", "Tue", "Wed", "Thu", "Fri"),
    "colors": ("red", "blue", "green", "white", "black"),
    "rooms": ("hall", "kitchen", "cellar", "study", "attic"),
    "metals": ("iron", "tin", "gold", "lead", "zinc"),
}
LEGS = "abcdef"
PLACES = 5
TRIPS_OF_DOCUMENT = 4
"""In the base corpus."""
NUM_BUCKETS = 16
BUCKETS = {"problems": range(1), "shq": range(1, 3), "ldq": range(3, 12), "base": range(12, 16)}
"""Of the hash of a question with six legs: the set in which it may be."""
SHARES = {
    "problems": (1, 1, 1, 1),
    "base": (1, 1, 1, 1),
    "ldq": (56, 17, 13.5, 13.5),
    "shq": (71, 21, 8, 0),
}
"""How often each ring is in a set: mathematics, code and the rest (the paper's has three) of LDQ and of SHQ."""
STEPS = 50
"""How many answers of LDQ in a hundred have steps."""
WRONG = 20
"""How many answers of LDQ in a hundred have a leg that is misread."""


@dataclass(frozen=True)
class Trip:
    """A ring, the word where a trip begins, and how far its legs take it."""

    ring: str
    start: int
    legs: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        """The legs as words: a+3."""
        return [f"{name}+{places}" for name, places in zip(LEGS, self.legs, strict=False)]

    @property
    def stops(self) -> list[str]:
        """The word after each leg."""
        return [RINGS[self.ring][total % PLACES] for total in itertools.accumulate(self.legs, initial=self.start)][1:]

    @property
    def question(self) -> str:
        """The start and the legs, which end their line."""
        return f"{RINGS[self.ring][self.start]} {' '.join(self.words)} ?\n"

    @property
    def bucket(self) -> int:
        """Its text alone decides."""
        return int.from_bytes(hashlib.sha256(self.question.encode()).digest()[:8]) % NUM_BUCKETS

    @property
    def answer(self) -> str:
        """Where it ends."""
        return f"Answer: {self.stops[-1]}"

    @property
    def steps(self) -> str:
        """The word after each leg."""
        steps = itertools.chain(*zip(self.words, self.stops, strict=True))
        return " ".join([RINGS[self.ring][self.start], *steps])

    @property
    def reasoning(self) -> str:
        """Every step, and where it ends."""
        return f"{self.steps}\n{self.answer}"

    def misread(self, draw: random.Random) -> "Trip":
        """The trip of a solver who reads another number of places in one leg."""
        wrong = draw.randrange(len(self.legs))
        places = draw.choice([places for places in range(1, PLACES + 1) if places != self.legs[wrong]])
        return Trip(self.ring, self.start, (*self.legs[:wrong], places, *self.legs[wrong + 1 :]))


@dataclass(frozen=True)
class TripOptions:
    """How many trips to write, and where to."""

    output: Path
    """The folder for the files."""
    num_base: PositiveInt = 20000
    """Documents without steps, of four trips each."""
    num_ldq: PositiveInt = 60000
    """Trips of LDQ."""
    num_shq: PositiveInt = 6000
    """Trips of SHQ."""
    num_problems: PositiveInt = 400
    """Held-out trips."""
    seed: int = 0
    """Decides which trips these are."""

    def __post_init__(self) -> None:
        for name, buckets in BUCKETS.items():
            # Not nearly all that there may be: the last ones take long to draw.
            most = PLACES ** (len(LEGS) + 1) * len(buckets) / NUM_BUCKETS * 0.8
            if getattr(self, f"num_{name}") * max(SHARES[name]) / sum(SHARES[name]) > most:
                raise UserError(f"--num-{name}: there are not so many trips; ask for fewer")


def draw_trips(name: str, num_trips: int, draw: random.Random) -> Iterator[Trip]:
    """Different trips of a set; only documents of the base corpus have fewer than six legs, which may repeat."""
    found: set[Trip] = set()
    for number in range(num_trips):
        # Problems are of every ring alike, and not only about so.
        ring = list(RINGS)[number % len(RINGS)] if name == "problems" else draw.choices(list(RINGS), SHARES[name])[0]
        num_legs = draw.randint(1, len(LEGS)) if name == "base" else len(LEGS)
        while True:
            trip = Trip(ring, draw.randrange(PLACES), tuple(draw.choices(range(1, PLACES + 1), k=num_legs)))
            if num_legs < len(LEGS) or (trip.bucket in BUCKETS[name] and trip not in found):
                break
        found.add(trip)
        yield trip


def ldq_answer(trip: Trip, draw: random.Random) -> str:
    """An answer of mixed quality."""
    told = trip.misread(draw) if draw.randrange(100) < WRONG else trip
    return told.reasoning if draw.randrange(100) < STEPS else told.answer


def every_word() -> str:
    """Every word at the beginning of a line and within it: the text for a tokenizer."""
    words = [*itertools.chain(*RINGS.values()), *(f"{leg}+{places}" for leg in LEGS for places in range(1, PLACES + 1))]
    return "\n".join(f"{word} {word}" for word in (*words, "Answer:", "?"))


def rows_of(name: str, num_rows: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """The rows of a set: documents of several trips, or questions with their answers."""
    trips = draw_trips(name, num_rows * (TRIPS_OF_DOCUMENT if name == "base" else 1), draw)
    if name == "base":
        for group in itertools.batched(trips, TRIPS_OF_DOCUMENT):
            yield {"text": "\n".join(trip.question + trip.answer for trip in group)}
        return
    for trip in trips:
        if name == "problems":
            yield {"prompt": trip.question, "answer": trip.stops[-1], "ring": trip.ring}
        else:
            answer = trip.reasoning if name == "shq" else ldq_answer(trip, draw)
            yield {"question": trip.question.strip(), "answer": answer}


def write_trips(options: TripOptions) -> None:
    """Write all files, read them back, and check that no question with six legs is in two of them."""
    folder = options.output
    write_json_lines(folder / "words.jsonl", [{"text": every_word()}])
    for name in BUCKETS:
        draw = random.Random(f"{options.seed} {name}")  # no set depends on the size of another
        write_json_lines(folder / f"{name}.jsonl", rows_of(name, getattr(options, f"num_{name}"), draw))
    check_apart([folder / f"{name}.jsonl" for name in BUCKETS])


def check_apart(paths: Sequence[Path]) -> None:
    """Raise RuntimeError when a question with six legs is in two of the files, or twice in one."""
    place: dict[str, Path] = {}
    for path in paths:
        for question in questions_in(path):
            if question in place:
                raise RuntimeError(f"the same trip is in {place[question]} and {path}: {question!r}")
            place[question] = path


def questions_in(path: Path) -> list[str]:
    """All questions with six legs that are anywhere in a file."""
    pattern = re.compile(rf"\w+(?: [{LEGS}]\+\d){{{len(LEGS)}}} \?")
    with path.open(encoding="utf-8") as file:
        return [found for row in map(json.loads, file) for text in row.values() for found in pattern.findall(text)]


if __name__ == "__main__":
    run(lambda: write_trips(parse(TripOptions, description=__doc__)))
