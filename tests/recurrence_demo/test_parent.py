"""The bundled parent is what the miniature says of it."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import house
import parent
import pytest

from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.records import write_json_lines

PARENT = Path(parent.__file__).parent / "parent"
REPOSITORY = PARENT.parents[2]


def is_as_described(report: dict) -> bool:
    """It knows the walks of one and two doors, and guesses the longer ones."""
    return report["short"]["all"] == 1.0 and max(report["problems"][doors] for doors in "456") < 0.4


def test_the_bundled_parent_is_small_and_knows_short_walks_alone() -> None:
    assert is_as_described(json.loads((PARENT / "report.json").read_text()))
    assert sum(path.stat().st_size for path in PARENT.iterdir()) < 2_000_000


def test_every_room_and_every_door_is_one_token() -> None:
    tokenizer = Tokenizer(PARENT)
    for walk in house.atoms():
        assert len(tokenizer.encode(walk.problem["prompt"])) == 1 + len(walk.doors)
        assert len(tokenizer.encode(walk.problem["response"])) == 1


def test_the_responses_of_a_conversation_are_learned_and_nothing_else(tmp_path: Path) -> None:
    rows = list(house.conversations(house.draw_training(6, random.Random(0)), 3))
    write_json_lines(tmp_path / "walks.jsonl", rows)
    pack_sft(
        PackOptions(
            input=[tmp_path / "walks.jsonl"],
            tokenizer=PARENT,
            output=tmp_path / "walks",
            num_workers=1,
            sequence_length=house.ROW_TOKENS,
            chat_template=parent.HERE / "chat_template.jinja",
        )
    )
    index, tokenizer = PackedIndex(tmp_path / "walks"), Tokenizer(PARENT)
    packed = {}
    for place in range(len(index)):
        [example] = index[place]
        packed[tokenizer.decode(example.tokens.tolist())] = tokenizer.decode(example.tokens[example.has_loss].tolist())
    said = [[message["content"] for message in row["messages"]] for row in rows]
    assert packed == {" " + " ".join(words): " " + " ".join(words[1::2]) for words in said}


@pytest.mark.example(minutes=3)
@pytest.mark.timeout(1800)
def test_the_parent_can_be_trained_again(tmp_path: Path) -> None:
    target = re.search(r"^recurrence-parent: setup\n\t\$\(PY\) (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert target is not None
    arguments = shlex.split(target[1].replace("runs/recurrence-parent", str(tmp_path / "parent")))
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert is_as_described(json.loads((tmp_path / "parent/report.json").read_text()))
    assert Tokenizer(tmp_path / "parent/model").fingerprint == Tokenizer(PARENT).fingerprint
