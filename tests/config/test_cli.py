"""Command lines: what is typed arrives as it was typed, or is refused in one line."""

import dataclasses
import errno
import os
import sys
from pathlib import Path

import pytest

from megatron_tpt.config import renamed
from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.command_line import options_of
from megatron_tpt.config.load import load_recipe
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
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


def test_every_mistake_is_reported_at_once_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "augment.yaml"
    path.write_text("model: m\nmax_new_token: 5\nfilters:\n  min_words: -1\nlimit: 0\ninput: [a]\ntemperature:\n")
    given = ["--num-wokers", "4", "--top-p", "2", "--estimate=x", "--engine", "vlm", "--filters.loop-word=1"]
    with pytest.raises(UserError) as refusal:
        parse(AugmentOptions, ["stray", "--recipe", str(path), *given])
    assert str(refusal.value).replace(f"{tmp_path}/", "").splitlines() == [
        "command line: stray belongs to no option: remove it, or see --help",
        "augment.yaml:2: max_new_token: unknown; did you mean max_new_tokens?",
        "augment.yaml:4: filters.min_words=-1 must be 0 or more",
        "command line: --filters.loop-word: unknown; did you mean --filters.loop-words?",
        "augment.yaml:5: limit=0 must be 1 or more",
        "command line: --num-wokers: unknown; did you mean --num-workers?",
        "command line: --top-p 2: must be above 0 and at most 1",
        "command line: --estimate: 'x' is not a whole number",
        "command line: --engine: 'vlm' is not one of vllm, vllm-server, endpoint, transformers",
        "--output is missing: give a path",
    ]


@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_name_of_before_is_read_with_a_warning(
    is_in_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "index.yaml"
    path.write_text("workers: 3\n")
    given = ["--recipe", str(path)] if is_in_file else ["--workers", "3"]
    needed = ["--input", "a", "--tokenizer", "t", "--output", "o"]
    assert parse(IndexOptions, [*given, *needed]).num_workers == 3
    where = (
        f"{path}:1: workers is called num_workers" if is_in_file else "command line: --workers is called --num-workers"
    )
    assert capsys.readouterr().err == f"warning: {where} now; the next release knows the new name only\n"
    with pytest.raises(UserError, match="and that is given too: remove one of them"):
        parse(IndexOptions, [*given, *needed, "--num-workers", "4"])


def test_names_of_before_in_recipes_are_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "finetune.yaml"
    path.write_text("data:\n  prompt_field: q\n")
    recipe, _ = load_recipe(FinetuneRecipe, [str(path), "--training.dtype=fp32"])
    assert (recipe.data.prompt_column, recipe.training.dtype) == ("q", "float32")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}:2: data.prompt_field is called prompt_column now; the next release knows the new name only",
        "warning: command line: training.dtype: fp32 is called float32 now; the next release knows the new name only",
    ]


def test_every_name_of_before_leads_to_a_field() -> None:
    options = (AugmentOptions, IndexOptions, PackOptions, PretrainRecipe, FinetuneRecipe)
    sections = {option.section for cls in options for option in options_of(cls)}
    named = {cls.__name__: {field.name for field in dataclasses.fields(cls)} for cls in sections}
    for name, entries in renamed.FIELDS.items():
        assert set(entries.values()) <= named[name] and not set(entries) & named[name]
    for name, values in renamed.VALUES.items():
        assert set(values) <= named[name]


def test_flags_words_and_what_is_none(tmp_path: Path) -> None:
    needed = ["--input", "a", "--tokenizer", "t", "--output", "o"]
    assert parse(IndexOptions, [*needed, "--no-append-eos", "--sentences"]).append_eos is False
    assert parse(IndexOptions, [*needed, "--append-eos=false", "--num-workers", "None"]).num_workers is None
    assert parse(IndexOptions, [*needed, "--join", "interleaved"]).join is Join.interleaved
    (tmp_path / "r.yaml").write_text("append-eos: false\nnum-workers: 2\n")
    options = parse(IndexOptions, [*needed, "--recipe", str(tmp_path / "r.yaml"), "--append-eos"])
    assert (options.append_eos, options.num_workers) == (True, 2)
    with pytest.raises(UserError, match="--output lacks its value"):
        parse(IndexOptions, ["--output", *needed[:4]])


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
