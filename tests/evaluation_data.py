"""Benchmarks and graded outputs of others, which are no part of this repository: in ../shared beside the checkout."""

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2] / "shared"
DATA = SHARED / "data" / "evaluation"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no {DATA} with benchmarks and graded outputs")


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of DATA/name.jsonl."""
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
