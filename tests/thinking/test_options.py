"""What the messages of augmenting say of its options."""

import dataclasses
import re
from pathlib import Path

import pytest

import megatron_tpt
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions

# Of vLLM's server, and of tools/analyze_thinking.py.
_OTHERS = {"--no", "--by", "--min-documents"}


def known_options() -> set[str]:
    names = {field.name for options in (AugmentOptions, ScaleOptions) for field in dataclasses.fields(options)}
    names |= {f"filters.{field.name}" for field in dataclasses.fields(FilterOptions)}
    return {"--recipe", "--filters", *(f"--{name.replace('_', '-')}" for name in names)}


@pytest.mark.parametrize("package", ["thinking", "generation"])
def test_messages_name_options_that_exist(package: str) -> None:
    folder = Path(megatron_tpt.__file__).parent / package
    named = {
        (path.name, option)
        for path in folder.glob("*.py")
        for option in re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?:\.[a-z]+(?:-[a-z]+)*)?", path.read_text())
    }
    assert len(named) > 10
    assert {entry for entry in named if entry[1] not in known_options() | _OTHERS} == set()
