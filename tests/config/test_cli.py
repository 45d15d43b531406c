"""Command lines: what is typed arrives as it was typed, or is refused in one line."""

import os
import sys
from pathlib import Path

import pytest

from megatron_tpt.config.cli import parse, run
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.indexing.options import IndexOptions


def test_ids_of_data_sets_arrive_whole() -> None:
    url = "hf://owner/name/config?split=train"
    more = ["--output", "out"]
    assert parse(IndexOptions, ["--input", url, "a.jsonl", "--tokenizer", "t", *more]).input == [url, "a.jsonl"]
    assert parse(PrepareOptions, ["--input", url, *more]).input == [url]
    assert parse(EvaluateOptions, ["--model", "m", "--data", url, *more]).data == url


def test_an_argument_that_is_not_utf8_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--output", os.fsdecode(b"caf\xe9")])
    begun: list[Path] = []
    with pytest.raises(SystemExit) as end:
        run(lambda: begun.append(Path()))
    assert (end.value.code, begun) == (2, [])
    assert capsys.readouterr().err == "error: caf\\xe9: not UTF-8; give another name\n"
