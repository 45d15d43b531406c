from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.studies.commands import REPOSITORY, Commands, empty_earlier


def test_a_command_runs_at_the_root_of_the_repository_and_is_shown_as_typed(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    program = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], *sys.argv[1:])"
    Commands(tmp_path / "logs").python("show", "-c", program, REPOSITORY / "tools/x.py", tmp_path, num_threads=3)
    assert (tmp_path / "logs/show.log").read_text().split() == [str(REPOSITORY), "3", "tools/x.py", str(tmp_path)]
    shown, done = capfd.readouterr().out.splitlines()
    assert "$ python -c 'import os" in shown and shown.endswith(f" tools/x.py {tmp_path}")
    assert "show: done in" in done


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('error: the first\\nerror: the cause\\nbye'); raise SystemExit(2)", "error: the cause"),
        ("raise KeyError('place')", "KeyError: 'place'"),
    ],
)
def test_a_failing_command_says_why_and_names_its_log(tmp_path: Path, program: str, reason: str) -> None:
    with pytest.raises(UserError) as failure:
        Commands(tmp_path).python("broken", "-c", program)
    text = str(failure.value)
    assert text.startswith("broken ended with exit code ") and str(tmp_path / "broken.log") in text
    assert text.splitlines()[-1] == reason


def test_only_a_folder_of_an_earlier_run_is_emptied(tmp_path: Path) -> None:
    output = tmp_path / "output"
    empty_earlier(output, "mark.json")
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no folder of an earlier run"):
        empty_earlier(output, "mark.json")
    assert (output / "notes.txt").read_text() == "mine"
    (output / "mark.json").touch()
    empty_earlier(output, "mark.json")
    assert not output.exists()
