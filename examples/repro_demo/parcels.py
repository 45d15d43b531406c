"""Parcels of three to nine legs, whose answers have parts: a longer version of the demo's language (examples/demo).

    A parcel leaves on Mon:
    a+6
    b+2
    c+4
    Which days?
    <think>
    a+6 Sun.
    b+2 Tue.
    c+4 Sat.
    </think>
    Answer: Tue Sat

The answer names the weekdays after the legs b, e and h, where there are these, and after the last one: two parts for
three to five legs, three for six to eight, four for nine. Each part is settled by a part of the thinking, which needs a
step for every leg.

python examples/repro_demo/parcels.py --output DIR writes

warm.jsonl      conversations from which the policy learns before reinforcement learning (chat_template.jinja): thinking
                in which steps are repeated now and then, and some that was cut short and answered all the same, with
                loss on the answer alone
prompts.jsonl   problems for reinforcement learning
problems.jsonl  problems to measure on, as many of every length
tokenizer/      one token for every word of the language

The hash of a question decides in which of the three it may be.
"""

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.errors import require
from megatron_tpt.records import write_json_lines

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from language import Parcel, check_disjoint, read_rows
from tokenizer import make_tokenizer

LEGS = "abcdefghi"
LENGTHS = range(3, 10)
"""Legs of a parcel."""
ASKED = "beh"
"""Legs after which the weekday is asked, besides the last one."""
REPEATED = 0.3
"""How often a step is repeated; a repetition is repeated as often again."""
CUT = 0.3
"""The share of examples whose thinking is cut short."""
SETS = {"problems": range(1), "prompts": range(1, 4), "warm": range(4, 8)}
"""Which remainders of the hash belong to which file."""


@dataclass(frozen=True)
class Route(Parcel):
    """A parcel of three to nine legs."""

    @property
    def legs(self) -> list[str]:
        return [f"{leg}+{num_days}" for leg, num_days in zip(LEGS, self.num_days, strict=False)]

    @property
    def steps(self) -> list[str]:
        """The thinking that it needs, step by step."""
        return [f"{leg} {day}.\n" for leg, day in zip(self.legs, self.stops, strict=True)]

    @property
    def question(self) -> str:
        lines = "\n".join(self.legs)
        return f"A parcel leaves on Mon:\n{lines}\nWhich days?\n"

    @property
    def right_answer(self) -> str:
        """The weekdays that are asked for."""
        last = len(self.num_days) - 1
        return " ".join(day for place, day in enumerate(self.stops) if LEGS[place] in ASKED or place == last)

    @property
    def part(self) -> str:
        """The file that it may be in. Its text alone decides."""
        digest = hashlib.sha256(self.question.encode()).digest()
        remainder = int.from_bytes(digest[:8]) % 8
        return next(name for name, remainders in SETS.items() if remainder in remainders)

    @property
    def problem(self) -> dict[str, Any]:
        """As it is asked and graded."""
        return {"id": " ".join(self.legs), "prompt": self.question, "answer": self.right_answer}


@dataclass(frozen=True)
class ParcelsOptions:
    """How much to write, and where to."""

    output: Path
    """The folder for the files."""
    num_examples: PositiveInt = 20000
    """Conversations of the warm start."""
    num_prompts: PositiveInt = 4000
    """Problems for reinforcement learning."""
    num_problems: PositiveInt = 32
    """Problems of every length to measure on."""
    seed: int = 0
    """Decides which parcels these are."""


def draw_routes(draw: random.Random, part: str | None = None) -> Iterator[Route]:
    """Parcels of one of the sets, or of all, each length as often as the others. Endless."""
    while True:
        route = Route(tuple(draw.randint(1, 7) for _ in range(draw.choice(LENGTHS))))
        if part in (None, route.part):
            yield route


def stuttered(route: Route, draw: random.Random) -> list[str]:
    """Its steps, each repeated at random."""
    steps = []
    for step in route.steps:
        steps.append(step)
        while draw.random() < REPEATED:
            steps.append(step)
    return steps


def think(steps: Sequence[str]) -> str:
    """Thinking of these steps, up to the answer."""
    return f"<think>\n{''.join(steps)}</think>\n"


def solved(route: Route) -> str:
    """All words of a parcel, each as it is in a conversation."""
    return f"{route.question}{think(route.steps)}Answer: {route.right_answer}"


def conversation(route: Route, draw: random.Random) -> dict[str, Any]:
    """An example of the warm start. Thinking that is cut short is nothing to learn: it is a message of its own."""
    question, answer = {"role": "user", "content": route.question}, f"Answer: {route.right_answer}"
    steps = stuttered(route, draw)
    if draw.random() < CUT:
        before = {"role": "assistant", "content": think(steps[: draw.randrange(len(steps))]), "weight": 0}
        return {"messages": [question, before, {"role": "assistant", "content": answer, "weight": 1}]}
    return {"messages": [question, {"role": "assistant", "content": think(steps) + answer, "weight": 1}]}


def draw_problems(num_problems: int, draw: random.Random) -> list[Route]:
    """So many different problems of every length."""
    shortest = map(Route, itertools.product(range(1, 8), repeat=LENGTHS[0]))
    most = sum(route.part == "problems" for route in shortest)
    require(
        num_problems <= most,
        f"--num-problems {num_problems}: only {most} parcels of {LENGTHS[0]} legs may be problems; ask for fewer",
    )
    found: dict[int, dict[Route, None]] = {length: {} for length in LENGTHS}
    routes = draw_routes(draw, "problems")
    while any(len(own) < num_problems for own in found.values()):
        route = next(routes)
        own = found[len(route.num_days)]
        if len(own) < num_problems:
            own[route] = None
    return [route for own in found.values() for route in own]


def write_parcels(options: ParcelsOptions) -> None:
    """Write all files, read them back, and check that no parcel is in two of them."""
    folder, draw = options.output, random.Random(options.seed)
    require(not folder.exists(), f"{folder}: exists; remove it or choose another --output")
    # The problems come first: they stay the same when there is more to learn from.
    problems = draw_problems(options.num_problems, draw)
    prompts = dict.fromkeys(itertools.islice(draw_routes(draw, "prompts"), options.num_prompts))
    warm = (conversation(route, draw) for route in itertools.islice(draw_routes(draw, "warm"), options.num_examples))
    every = itertools.islice(draw_routes(random.Random(0)), 2000)  # the same tokenizer for every seed
    make_tokenizer(folder / "tokenizer", [solved(route) for route in every])
    write_json_lines(folder / "problems.jsonl", (route.problem for route in problems))
    write_json_lines(folder / "prompts.jsonl", (route.problem for route in prompts))
    write_json_lines(folder / "warm.jsonl", warm)
    check_disjoint(
        {
            "problems": (row["prompt"] for row in read_rows(folder / "problems.jsonl")),
            "prompts": (row["prompt"] for row in read_rows(folder / "prompts.jsonl")),
            "warm start": dict.fromkeys(
                json.loads(line)["messages"][0]["content"] for line in (folder / "warm.jsonl").open(encoding="utf-8")
            ),
        }
    )


if __name__ == "__main__":
    run(lambda: write_parcels(parse(ParcelsOptions, description=__doc__)))
