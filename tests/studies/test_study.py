import json
from pathlib import Path

import pytest
import yaml

from megatron_tpt.errors import UserError
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.study import load_study, run_study

# Stands for an experiment: its result depends on the seed, and it counts how often it was run.
SCRIPT = """
import json, pathlib, sys
seed, output = int(sys.argv[1]), pathlib.Path(sys.argv[2])
output.mkdir(parents=True)
point = dict(arm="only", tokens=1000, accuracy=seed / 10, num_problems=10, seed=seed)
(output / "out.json").write_text(json.dumps({"points": [point]}))
with (output.parent / "runs.txt").open("a") as file:
    file.write(f"{seed} ")
"""


def write_study(folder: Path, **changes: object) -> Path:
    (folder / "script.py").write_text(SCRIPT)
    content = {"title": "T", "command": [str(folder / "script.py"), "{seed}", "{output}"], "seeds": [1, 3]}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | {"results": "out.json"} | changes))
    return path


def test_every_seed_is_run_once_and_reported(tmp_path: Path):
    options = StudyOptions(write_study(tmp_path), tmp_path / "runs")
    for _ in range(2):  # the second time all results are there
        run_study(options)
    write_study(tmp_path, seeds=[1, 3, 5])
    run_study(options)
    assert (tmp_path / "runs/runs.txt").read_text() == "1 3 5 "
    [summary] = json.loads((tmp_path / "runs/report/results.json").read_text())["summaries"]
    assert summary["mean"] == pytest.approx(0.3) and summary["num_seeds"] == 3
    assert (tmp_path / "runs/report/accuracy.png").is_file()


def test_results_of_another_command_are_not_mixed_in(tmp_path: Path):
    run_study(StudyOptions(write_study(tmp_path), tmp_path / "runs"))
    path = write_study(tmp_path, command=[str(tmp_path / "script.py"), "{seed}", "{output}", "more"])
    with pytest.raises(UserError, match="another command"):
        run_study(StudyOptions(path, tmp_path / "runs"))


def test_a_failed_run_stops_the_study(tmp_path: Path):
    path = write_study(tmp_path, command=["-c", "import sys; sys.exit(3)", "{seed}", "{output}"])
    with pytest.raises(UserError, match="exit code 3"):
        run_study(StudyOptions(path, tmp_path / "runs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "sead: unknown; known are title"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"command": ["script.py", "{output}"]}, r"\{seed\}"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path, **changes))
