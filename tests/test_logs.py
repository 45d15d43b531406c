"""What is logged is shown by programs alone, at the level that is asked for, and little of ranks but the first."""

import io
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from megatron_tpt import logs
from megatron_tpt.config.cli import run
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.ordered_workers import map_in_order
from megatron_tpt.jobs.workers import Workers

TOOL, TRAINING = logging.getLogger("megatron_tpt.corpus.prepare"), logging.getLogger("megatron_tpt.training.trainer")


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Configures logging at a level, and as it was at the end."""

    def configured(level: str) -> None:
        monkeypatch.setenv(logs.LEVEL_VARIABLE, level)
        logs.configure()

    yield configured
    monkeypatch.undo()
    logs.configure()


def test_what_a_run_logs_is_on_stdout_but_errors_and_of_others_all_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for logger, name in ((TRAINING, "run"), (TOOL, "tool")):
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)(f"{name} {level}")
    logs.print_result("result", 1)
    said = capsys.readouterr()
    assert said.out == "run info\nwarning: run warning\nresult 1\n"
    assert said.err == "error: run error\ntool info\nwarning: tool warning\nerror: tool error\n"


@pytest.mark.parametrize("rank", ["0", "3"])
def test_of_other_ranks_errors_and_what_is_meant_for_all_are_shown_with_the_rank(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    TRAINING.info("step 1")
    TRAINING.warning("odd")
    TRAINING.info("profile", extra=logs.ALL_RANKS)
    TRAINING.warning("slow", extra=logs.ALL_RANKS)
    TRAINING.error("taken over")
    if rank == "0":
        expected = "step 1\nwarning: odd\nprofile\nwarning: slow\n", "error: taken over\n"
    else:
        expected = "[rank 3] profile\n[rank 3] warning: slow\n", "[rank 3] error: taken over\n"
    assert capsys.readouterr() == expected


@pytest.mark.parametrize(
    ("level", "shown"),
    [("error", ["e"]), ("warning", ["w", "e"]), ("info", ["i", "w", "e"]), ("debug", ["d", "i", "w", "e"])],
)
def test_the_environment_says_which_levels_are_shown(
    level: str, shown: list[str], configure: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(level)
    for each in ("debug", "info", "warning", "error"):
        getattr(TOOL, each)(each[0])
    lines = capsys.readouterr().err.splitlines()
    assert [line[-1] for line in lines] == shown
    if level == "debug":
        begin = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} megatron_tpt\.corpus\.prepare: ")
        assert [begin.sub("", line, count=1) for line in lines] == ["d", "i", "warning: w", "error: e"]


def test_a_level_that_does_not_exist_ends_a_program_with_code_2(
    configure: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        configure("verbose")
    with pytest.raises(SystemExit) as ended:
        run(lambda: pytest.fail("the program was started"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: MEGATRON_TPT_LOG_LEVEL=verbose: not a level; give one of debug, info, warning, error\n"
    )


def test_what_would_act_on_a_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    TOOL.warning("%s: odd\nand\tmore", "a\x1b[2J.jsonl")
    assert capsys.readouterr().err == "warning: a\\x1b[2J.jsonl: odd\nand\tmore\n"


def test_a_log_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            TOOL.info("x")
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()


def test_an_error_is_shown_while_standard_output_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs, is_over = threading.Event(), threading.Event()

    class Hanging(io.StringIO):
        def write(self, text: str) -> int:
            hangs.set()
            is_over.wait()
            return len(text)

    monkeypatch.setattr(sys, "stdout", Hanging())
    threads = [
        threading.Thread(target=TRAINING.info, args=["step 1"]),
        threading.Thread(target=TRAINING.error, args=["no progress"]),
    ]
    try:
        threads[0].start()
        hangs.wait()
        threads[1].start()
        threads[1].join(timeout=30)
        assert capsys.readouterr().err == "error: no progress\n"
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


LIBRARY = """
import logging
from megatron_tpt.corpus import prepare
from megatron_tpt.recipes import program
from megatron_tpt.training import launchers
for name in (None, *logging.root.manager.loggerDict):
    if name is None or name.startswith("megatron_tpt"):
        logger = logging.getLogger(name)
        assert not logger.handlers and logger.propagate and logger.level in (logging.NOTSET, logging.WARNING), name
launchers.logger.info("not shown")
launchers.logger.warning("shown")
"""


def test_imported_as_a_library_the_package_configures_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "shown\n")


def warn_of(item: int) -> int:
    TOOL.info("item %d", item)
    TOOL.warning("item %d is odd", item)
    return item


def warn_of_task(item: int) -> Iterator[int]:
    yield warn_of(item)


def make_work() -> Callable[[int], int]:
    return warn_of


def in_workers() -> None:
    with Workers(2) as workers:
        list(workers.run(warn_of_task, [1, 2]))


def in_ordered_workers() -> None:
    list(map_in_order(make_work, [1, 2], 2, str))


@pytest.mark.parametrize("work", [in_workers, in_ordered_workers])
@pytest.mark.parametrize("is_program", [True, False])
def test_worker_processes_show_what_the_process_that_started_them_would(
    work: Callable[[], None], is_program: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not is_program:
        monkeypatch.setattr(logs, "_logger", logging.Logger("of a library"))
    work()
    in_program = [f"item {item}" for item in (1, 2)] + [f"warning: item {item} is odd" for item in (1, 2)]
    in_library = [f"item {item} is odd" for item in (1, 2)]
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(in_program if is_program else in_library)
