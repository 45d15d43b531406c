"""Command lines: what is typed arrives as it was typed, or is refused in one line."""

import errno
import os
import sys
from pathlib import Path

import pytest

from megatron_tpt.config.cli import parse, run
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.thinking.options import AugmentOptions


def test_ids_of_data_sets_arrive_whole() -> None:
    url = "hf://owner/name/config?split=train"
    more = ["--output", "out"]
    assert parse(IndexOptions, ["--input", url, "a.jsonl", "--tokenizer", "t", *more]).input == [url, "a.jsonl"]
    assert parse(PrepareOptions, ["--input", url, *more]).input == [url]
    assert parse(EvaluateOptions, ["--model", "m", "--data", url, *more]).data == url


@pytest.mark.parametrize(
    ("repeated", "name"),
    [
        (["--input", "a", "--input", "b"], "--input"),
        (["--input=a", "--input=b"], "--input"),
        (["--input", "a", "b", "--input=c"], "--input"),
    ],
)
def test_a_list_given_twice_is_refused(repeated: list[str], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is given 2 times"):
        parse(IndexOptions, [*repeated, "--tokenizer", "t", "--output", "o"])


@pytest.mark.parametrize(
    ("repeated", "name"),
    [
        (["--text-column=x", "--text_column", "y"], "--text-column"),
        (["--text-column", "y", "--append-eos", "--no-append-eos"], "--append-eos"),
    ],
)
def test_of_other_options_the_last_wins_and_that_is_said(
    repeated: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(IndexOptions, ["--input", "a", *repeated, "--tokenizer", "t", "--output", "o"])
    assert options.text_column == "y"
    assert capsys.readouterr().err == f"note: {name} is given 2 times; the last one counts\n"


def test_options_that_collect_can_be_repeated_and_win_over_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nseed: 1\n")
    more = ["--input", "a", "--output", "o", "--engine", "endpoint", "--endpoints", "http://localhost:1/v1"]
    fields = ["--request-field", "top_k=20", "--request-field", "min_p=0.1"]
    options = parse(AugmentOptions, ["--recipe", str(tmp_path / "r.yaml"), "--seed", "2", *more, *fields])
    assert options.request_fields() == {"top_k": 20, "min_p": 0.1}
    assert options.seed == 2


def test_an_argument_that_is_not_utf8_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "--output", os.fsdecode(b"caf\xe9")])
    begun: list[Path] = []
    with pytest.raises(SystemExit) as end:
        run(lambda: begun.append(Path()))
    assert (end.value.code, begun) == (2, [])
    assert capsys.readouterr().err == "error: caf\\xe9: not UTF-8; give another name\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full (x); make room"),
        (errno.EROFS, "can only be read (x)"),
        (errno.EMFILE, "too many open files (x); raise the limit of open files (ulimit -n"),
        (errno.EFBIG, "(ulimit -f)"),
        (errno.EACCES, "permission denied (x)"),
    ],
)
def test_what_the_machine_does_not_allow_is_one_line_without_a_traceback(
    code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code), "x")

    with pytest.raises(SystemExit) as ended:
        run(fail)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "options.yaml").write_text("output: ~/o\ntokenizer: ~")
    options = parse(IndexOptions, ["--input", "a", "--tokenizer=~/t", "--recipe", str(tmp_path / "options.yaml")])
    assert (options.output, options.tokenizer) == (Path("/home/someone/o"), Path("/home/someone/t"))
    with pytest.raises(UserError, match="~nobody_of_this_name/o: there is no such home folder"):
        parse(IndexOptions, ["--input", "a", "--tokenizer=t", "--output=~nobody_of_this_name/o"])


def test_ctrl_c_in_the_midst_of_a_clean_up_is_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            os.close(1 << 20)  # no such descriptor: it was closed when the signal came

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == ""
