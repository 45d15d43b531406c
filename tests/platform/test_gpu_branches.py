"""No code for GPUs alone is added without a word in docs/gpu.md on what touches it."""

import re
from pathlib import Path

from gpu_branches import branches

PAGE = Path(__file__).parents[2] / "docs/gpu.md"


def test_every_branch_for_gpus_is_listed_with_what_touches_it() -> None:
    listed = dict(re.findall(r"^\| `([\w/.]+\.py(?::[\w.]+)?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    assert listed.keys() == branches().keys()


def test_the_tests_that_are_named_are_there() -> None:
    root = PAGE.parents[1]
    for name in re.findall(r"`((?:tests|tools|benchmarks)/[\w/.]+\.(?:py|sh))", PAGE.read_text()):
        assert (root / name).is_file(), name
