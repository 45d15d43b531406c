"""tools/status.py: the page, the JSON, and watching."""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from monitored import NOW, heartbeat, lock, running
from rich.console import Console

from megatron_tpt.config.cli import parse
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.folder import JobFolder
from megatron_tpt.monitoring.options import StatusOptions
from megatron_tpt.monitoring.page import page
from megatron_tpt.monitoring.status import read_folders, show_status
from megatron_tpt.tools.status import main

Run = Callable[..., str]


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tools/status.py", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a job, and something else. The clock of the tool stands still."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    running(tmp_path / "runs/a")
    JobFolder(tmp_path / "runs/thinking", "job.json").note_finished(0, 1)
    (tmp_path / "runs/notes").mkdir()
    return tmp_path / "runs"


def test_the_page_has_a_line_for_each_and_warnings_below(runs: Path, run_tool: Run) -> None:
    run = runs / "a"
    heartbeat(run, rank=1, age_s=400)
    text = run_tool(runs)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["state", "done", "loss", "validation", "tokens/s", "MFU", "left", "checkpoint", "heartbeat"]
    [row] = [" ".join(line) for line in lines if "running" in line]
    assert row.endswith("running 40/100 steps, 40% 2.5000 2.6000 1,234 41.5% 10 min 40 (10 min ago) 5 s ago")
    [job] = [" ".join(line) for line in lines if "finished" in line and "running" not in line]
    assert job.endswith("finished tasks: 1 finished")
    assert f"{run}: rank 1 on node1 shows no sign of life for 7 min" in text.replace("\n", " ")
    assert "notes" not in text


def test_a_narrow_terminal_has_two_lines_for_each(runs: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(page(read_folders([runs]), console.width))
    text = "".join(console.file.getvalue().split())  # a long path takes lines of its own
    expected = f"{runs / 'a'} running 40/100 steps, 40% loss 2.5000, validation 2.6000, tokens/s 1,234"
    assert "".join(expected.split()) in text
    assert f"{runs / 'thinking'}finishedtasks:1finished" in text


def test_several_are_shown_in_the_order_given(runs: Path, run_tool: Run) -> None:
    text = run_tool(runs / "thinking", runs / "a")
    assert text.index("finished") < text.index("running")


def test_json_has_every_number(runs: Path, run_tool: Run) -> None:
    first, second = json.loads(run_tool(runs, "--json"))
    assert (first["folder"], first["state"], first["losses"]["loss"]) == (str(runs / "a"), "running", 2.5)
    assert (second["kind"], second["tasks"]) == ("job", {"finished": 1})


def test_names_and_warnings_act_on_no_terminal(tmp_path: Path, run_tool: Run) -> None:
    run = running(tmp_path / "[red]a\x1b[31m")
    heartbeat(run, age_s=10, phase="[bold]x\x1b[0m")
    (run / "run.lock").unlink()
    text = run_tool(tmp_path)
    assert "\x1b" not in text and "[red]a" in text and "[bold]x" in text


def test_watching_shows_what_changes_until_it_is_interrupted(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        heartbeat(runs / "a", step=60)

    options = parse(StatusOptions, [str(runs / "a"), "--watch", "--json", "--interval-s", "0.5"])
    show_status(options, wait)
    before, after = map(json.loads, capsys.readouterr().out.splitlines())
    assert (before[0]["step"], after[0]["step"]) == (40, 60) and waits == [0.5, 0.5]
    waits.clear()
    show_status(parse(StatusOptions, [str(runs / "a"), "--watch"]), wait)
    assert capsys.readouterr().out.count("60/100 steps") == 2


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no folder: give that of a run"):
        read_folders([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds neither a run nor a job of tasks"):
        read_folders([tmp_path])


def test_folders_are_given_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(StatusOptions, ["a", "b", "--watch", "c"]).folders == [Path("a"), Path("b"), Path("c")]
    with pytest.raises(UserError, match="FOLDERS"):
        parse(StatusOptions, [])
    with pytest.raises(SystemExit):
        parse(StatusOptions, ["--help"])
    assert "FOLDERS ... [OPTION ...]" in capsys.readouterr().out


def test_a_run_whose_process_has_just_begun_is_starting(tmp_path: Path) -> None:
    lock(tmp_path, since_s=10)
    (tmp_path / "run.yaml").write_text("training: {num_steps: 7}\n")
    [found] = read_folders([tmp_path], NOW)
    assert (found.state, found.num_steps, found.step) == ("starting", 7, None)
