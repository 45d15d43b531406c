"""Walks through a house: problems that take as many look-ups, one after the other, as a walk has doors.

    prompt    hall red blue green      (start in the hall; go through the red door, the blue one, the green one)
    response  attic                    (where the walk ends)

Every room has a door of every color. Doors do not commute, and together they generate all 120 permutations of the five
rooms: a walk cannot be abbreviated by counting its doors. No two doors of one color lead to the same room, and no two
doors of one room do (a Latin square), so a walk of which one door is not known may end anywhere. A door may lead back
into its own room.

There is no mark before the response: any token may be the last one, so every position has to hold the room that the
walk has reached. Training data are conversations of many walks, one behind the other, and nothing says where one begins
(chat_template.jinja): a walk cannot be remembered as a whole.

    hall red blue green attic kitchen white hall ...

python examples/recurrence_demo/house.py --output DIR writes atoms.jsonl (walks of one and two doors, from which the
parent learns), train_3.jsonl to train_6.jsonl (walks of 1 to 3, ..., 1 to 6 doors), problems.jsonl (walks of 3 to 6
doors that are in none of the others: the hash of a prompt decides where it may be) and short.jsonl (all walks of one
and two doors, as problems).
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import UserError
from megatron_tpt.records import write_json_lines

ROOMS = ("hall", "kitchen", "cellar", "study", "attic")
DOORS = {
    "red": (4, 3, 1, 2, 0),
    "blue": (3, 4, 0, 1, 2),
    "green": (1, 2, 3, 0, 4),
    "white": (2, 0, 4, 3, 1),
    "black": (0, 1, 2, 4, 3),
}
"""Where each door leads from each room: red from the hall (0) to the attic (4)."""
ATOMS = (1, 2)
"""Doors of the parent's walks. There are only 150 such walks: all of them are trained on."""
LENGTHS = (3, 4, 5, 6)
"""Doors of the problems; the longest walks of the training files, one after the other."""
ROW_TOKENS = 60
"""Tokens of a conversation at most: training.sequence_length of the recipes."""
HELD_OUT = 5
"""One in five walks of these lengths is held out."""


@dataclass(frozen=True)
class Walk:
    """A room, by its number, and the doors that a walk from there takes."""

    start: int
    doors: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The walk as text."""
        return " ".join((ROOMS[self.start], *self.doors))

    @property
    def response(self) -> str:
        """The room where it ends."""
        room = self.start
        for door in self.doors:
            room = DOORS[door][room]
        return ROOMS[room]

    @property
    def is_held_out(self) -> bool:
        """Whether it may be a problem, and then never training data. Its text alone decides."""
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return len(self.doors) in LENGTHS and int.from_bytes(digest[:8]) % HELD_OUT == 0

    @property
    def problem(self) -> dict[str, str]:
        """As it is asked and answered; words begin with a blank."""
        return {"prompt": f" {self.prompt}", "response": f" {self.response}"}

    @property
    def messages(self) -> list[dict[str, str]]:
        """Its part of a conversation."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class HouseOptions:
    """How many walks to write, and where to."""

    output: Path
    """The folder for the files."""
    num_rows: PositiveInt = 1700
    """Conversations of every training file but the last one, which has six times as many: more than any arm reads."""
    num_problems: PositiveInt = 100
    """Problems of every length."""
    seed: int = 0
    """Decides which walks these are."""


def all_walks(num_doors: int) -> Iterator[Walk]:
    """Every walk through `num_doors` doors."""
    for start, doors in itertools.product(range(len(ROOMS)), itertools.product(DOORS, repeat=num_doors)):
        yield Walk(start, doors)


def atoms() -> list[Walk]:
    """The parent's walks."""
    return [walk for num_doors in ATOMS for walk in all_walks(num_doors)]


def draw_training(longest: int, draw: random.Random) -> Iterator[Walk]:
    """Walks of 1 to `longest` doors that are not held out, each length as often as the others; a short one often, for
    there are not many. Endless."""
    names = list(DOORS)
    while True:
        walk = Walk(draw.randrange(len(ROOMS)), tuple(draw.choices(names, k=draw.randint(1, longest))))
        if not walk.is_held_out:
            yield walk


def conversations(walks: Iterator[Walk], num_rows: int) -> Iterator[dict[str, Any]]:
    """So many conversations of as many walks as a row has room for."""
    walk = next(walks)
    for _ in range(num_rows):
        messages: list[dict[str, str]] = []
        num_tokens = 0
        while num_tokens + len(walk.doors) + 2 <= ROW_TOKENS:
            messages += walk.messages
            num_tokens += len(walk.doors) + 2
            walk = next(walks)
        yield {"messages": messages}


def draw_problems(num_problems: int, draw: random.Random) -> list[Walk]:
    """So many different problems of every length."""
    problems = []
    for num_doors in LENGTHS:
        candidates = [walk for walk in all_walks(num_doors) if walk.is_held_out]
        if num_problems > len(candidates):
            raise UserError(
                f"--num-problems {num_problems}: only {len(candidates)} walks of {num_doors} doors are held out; ask "
                f"for fewer"
            )
        problems += draw.sample(candidates, num_problems)
    return problems


def write_house(options: HouseOptions) -> None:
    """Write all files, read them back, and check that no problem is among the training data."""
    folder, draw = options.output, random.Random(options.seed)
    write_json_lines(folder / "problems.jsonl", (walk.problem for walk in draw_problems(options.num_problems, draw)))
    write_json_lines(folder / "short.jsonl", (walk.problem for walk in atoms()))
    training = {folder / "atoms.jsonl": ATOMS[-1]} | {folder / f"train_{longest}.jsonl": longest for longest in LENGTHS}
    for path, longest in training.items():
        num_rows = options.num_rows * (6 if longest == LENGTHS[-1] else 1)
        write_json_lines(path, conversations(draw_training(longest, draw), num_rows))
    check_disjoint(folder / "problems.jsonl", training)


def check_disjoint(problems: Path, training: Iterable[Path]) -> None:
    """Raise RuntimeError when a problem is there twice, or in one of the training files."""
    prompts = [row["prompt"].strip() for row in read_rows(problems)]
    asked = set(prompts)
    if len(asked) < len(prompts):
        raise RuntimeError(f"{problems}: a problem is there twice")
    for path in training:
        for message in (message for row in read_rows(path) for message in row["messages"]):
            if message["content"] in asked:
                raise RuntimeError(f"the same walk is in {problems} and {path}: {message['content']!r}")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one of the files."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    run(lambda: write_house(parse(HouseOptions, description=__doc__)))
