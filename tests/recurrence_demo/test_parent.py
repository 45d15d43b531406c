"""The bundled parent is what the miniature says of it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import house
import parent
import pytest

from megatron_tpt.indexing.tokenizer import Tokenizer

PARENT = Path(parent.__file__).parent / "parent"
REPOSITORY = PARENT.parents[2]


def is_as_described(report: dict) -> bool:
    """It knows the walks of one and two doors, and guesses the longer ones."""
    return report["atoms"]["all"] == 1.0 and max(report["problems"][doors] for doors in "456") < 0.4


def test_the_bundled_parent_is_small_and_knows_short_walks_alone() -> None:
    assert is_as_described(json.loads((PARENT / "report.json").read_text()))
    assert sum(path.stat().st_size for path in PARENT.iterdir()) < 2_000_000


def test_every_room_and_every_door_is_one_token() -> None:
    tokenizer = Tokenizer(PARENT)
    for walk in house.atoms():
        assert len(tokenizer.encode(walk.prompt)) == 1 + len(walk.doors)
        assert len(tokenizer.encode(walk.response)) == 1


@pytest.mark.slow(minutes=3)
@pytest.mark.timeout(1800)
def test_the_parent_can_be_trained_again(tmp_path: Path) -> None:
    target = re.search(r"^recurrence-parent: setup\n\t\$\(PY\) (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert target is not None
    arguments = shlex.split(target[1].replace("runs/recurrence-parent", str(tmp_path / "parent")))
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert is_as_described(json.loads((tmp_path / "parent/report.json").read_text()))
    assert Tokenizer(tmp_path / "parent/model").fingerprint == Tokenizer(PARENT).fingerprint
