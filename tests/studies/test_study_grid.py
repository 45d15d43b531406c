"""A grid of 2 x 2 arms x 2 seeds: what is shared runs once, and again only what has to."""

import csv
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_study import EVERY_STEP, STEP, Toy, wait_until

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    toy = Toy(tmp_path)
    toy.write()
    return toy


TWO = ScaleOptions(num_workers=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a study that has run once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_FOLDER", str(folder))
        toy = Toy(folder)
        toy.write()
        toy.run(scale=TWO)
        yield folder


@pytest.fixture
def run_toy(toy: Toy, finished: Path) -> Toy:
    """A copy of the study that has run once, with a note for every step that did."""
    shutil.copytree(finished, toy.folder, dirs_exist_ok=True)
    return toy


def test_shared_steps_run_once_and_a_changed_setting_runs_exactly_what_needs_it(run_toy: Toy) -> None:
    toy = run_toy
    assert toy.new_starts() == EVERY_STEP and len(toy.values()) == 8
    first = toy.values()
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter()
    content = toy.content()
    content["factors"]["sft"]["long"]["value"] = "longer"
    toy.write(content)
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter({"tune:longer": 4})
    changed = {levels for levels, value in toy.values().items() if value != first[levels]}
    assert changed == {levels for levels in first if levels[1] == "long"}
    content["factors"]["pre"]["plain"]["value"] = "P"
    toy.write(content)
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter({"train:P0": 1, "train:P1": 1, "tune:s": 2, "tune:longer": 2})
    toy.write()  # what was run with the first settings is found again
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter() and toy.values() == first


def test_more_levels_run_only_what_is_new(run_toy: Toy) -> None:
    run_toy.new_starts()
    content = run_toy.content()
    content["factors"]["sft"]["none"] = {"value": "n"}
    content["exclude"] = [{"sft": "none", "seed": 1}]
    run_toy.write(content)
    run_toy.run(scale=TWO)
    assert run_toy.new_starts() == Counter({"tune:n": 2}) and len(run_toy.values()) == 10


@pytest.mark.slow(minutes=0.4)
def test_a_killed_study_is_resumed_and_repeats_no_finished_step(toy: Toy) -> None:
    (hold := toy.folder / "hold tune").touch()
    study = toy.start("--num-workers", "2")
    wait_until(lambda: study.poll() is not None or len(toy.notes()) == 4)  # two of train have ended, two of tune wait
    processes = [process for name, process in toy.notes() if name.startswith("tune")]
    study.send_signal(signal.SIGKILL)
    study.communicate()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))
    assert toy.new_starts() == Counter({"train:p0": 1, "train:p1": 1, "tune:s": 2})
    assert len(toy.records()) == 2
    hold.unlink()
    printed, _ = (again := toy.start("--num-workers", "2")).communicate(timeout=300)
    assert again.returncode == 0, printed
    assert toy.new_starts() == Counter({"train:t0": 1, "train:t1": 1, "tune:s": 4, "tune:l": 4})
    values = toy.values()
    shutil.rmtree(toy.output)
    toy.run(scale=TWO)
    assert toy.values() == values


def test_a_failed_step_stops_only_what_needs_it(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    content = toy.content()
    content["factors"]["seed"] = [0]
    toy.write(content)
    (fault := toy.folder / "fail train:p0").touch()
    with pytest.raises(Fault, match=r"1 step failed: train plain, 0; 2 that need them did not run"):
        toy.run(scale=TWO)
    assert toy.new_starts() == Counter({"train:p0": 1, "train:t0": 1, "tune:s": 1, "tune:l": 1})
    assert "Not complete: 2 of 4 results missing" in (toy.output / "report/report.md").read_text()
    toy.run(status=True)
    shown = capfd.readouterr().out
    assert len(re.findall(r"^tune plain.* blocked ", shown, re.MULTILINE)) == 2
    assert "train plain, 0 failed: the shelf is empty; log " in shown
    fault.unlink()
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter({"train:p0": 1, "tune:s": 1, "tune:l": 1})


@pytest.mark.slow(minutes=0.5)
def test_slurm_gives_the_same_results(toy: Toy, cluster: Path) -> None:
    toy.run(scale=TWO)
    values = toy.values()
    toy.new_starts()
    shutil.rmtree(toy.output)
    slurm = ScaleOptions("slurm", cpus_per_task=1, wait=True)
    toy.run(scale=slurm)
    assert toy.new_starts() == EVERY_STEP and toy.values() == values
    toy.run(scale=slurm)
    assert toy.new_starts() == Counter()


@pytest.mark.slow
def test_on_slurm_a_failed_step_stops_only_what_needs_it(toy: Toy, cluster: Path) -> None:
    (toy.folder / "fail train:p0").touch()
    content = toy.content()
    content["factors"]["seed"] = [0]
    toy.write(content)
    with pytest.raises(Fault, match="1 step failed: train plain, 0; 2 that need them did not run"):
        toy.run(scale=ScaleOptions("slurm", cpus_per_task=1, wait=True))
    assert toy.new_starts() == Counter({"train:p0": 1, "train:t0": 1, "tune:s": 1, "tune:l": 1})


@pytest.mark.slow(minutes=0.7)
def test_on_slurm_a_step_that_stops_before_its_time_limit_is_resumed_and_what_needs_it_waits(
    toy: Toy, cluster: Path
) -> None:
    """As a training run does: it stops early by itself with code 75, which torchrun turns into 1."""
    train = (
        "import os, pathlib, sys, time; place = pathlib.Path(sys.argv[1]); is_first = not place.exists(); "
        "place.mkdir(exist_ok=True); left = float(os.environ['SLURM_JOB_END_TIME']) - time.time(); "
        "time.sleep(max(left - 1, 0) if is_first else 0); sys.exit(is_first)"
    )
    # As newer releases of SLURM do by themselves.
    limit = "export SLURM_JOB_START_TIME=$(date +%s) SLURM_JOB_END_TIME=$(($(date +%s) + 20))"
    test = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); next(pathlib.Path(sys.argv[2]).parent.iterdir())"
    steps = {
        "train": {"command": ["-c", train, "{output}"], "scale": {"env_command": limit}},
        "test": {"command": ["-c", test, "{output}", "{train}"]},
    }
    toy.write({"title": "T", "factors": {"seed": [0]}, "steps": steps})
    toy.run(scale=ScaleOptions("slurm", cpus_per_task=1, wait=True))
    attempts = {path.parts[-3]: json.loads(path.read_text())["attempts"] for path in toy.output.glob("*/*/done.json")}
    assert attempts == {"train": 2, "test": 1}


@pytest.mark.slow
def test_on_slurm_srun_starts_as_many_processes_of_a_step_as_its_job_has_tasks(toy: Toy, cluster: Path) -> None:
    program = (
        "import os, pathlib, sys; place = pathlib.Path(sys.argv[1]); place.mkdir(exist_ok=True); "
        "(place / os.environ['SLURM_PROCID']).touch()"
    )
    step = {
        "command": ["-c", program, "{output}"], "launcher": ["srun"], "scale": {"sbatch_args": ["ntasks=2"]},
        "outputs": ["0", "1"],
    }  # fmt: skip
    toy.write({"title": "T", "factors": {"seed": [0]}, "steps": {"train": step}})
    toy.run(scale=ScaleOptions("slurm", cpus_per_task=1, wait=True))
    assert [record["attempts"] for record in toy.records().values()] == [1]


def test_the_report_is_made_again_from_the_folders_with_the_same_figures(run_toy: Toy) -> None:
    toy = run_toy
    folder = toy.output / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"report.md", "report.html", "results.csv", "score-tokens.png", "score-FLOPs.png"} <= before.keys()
    shutil.rmtree(folder)
    toy.run(report=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # Every figure leads to its file.
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert json.loads((toy.output / row["source"]).read_text())["score"] == float(row["value"])
        assert (row["trained_tokens"], row["flops"], row["trials"]) == ("1200.0", "72000.0", "50")
    with (folder / "means.csv").open() as file:
        for mean in csv.DictReader(file):
            own = [rows[int(number) - 1] for number in mean["rows"].split()]
            assert {(row["pre"], row["sft"]) for row in own} == {(mean["pre"], mean["sft"])} and len(own) == 2
            assert float(mean["mean"]) == pytest.approx(sum(float(row["value"]) for row in own) / 2)


def test_a_dry_run_prints_the_graph_and_its_cost_and_starts_nothing(
    toy: Toy, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.run(dry_run=True)
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["train", "plain,", "0", "waiting", "1,000", "0", "6e+04", "0.5"] in lines
    assert ["tune", "plain,", "short,", "0", "waiting", "200", "0", "1.2e+04", "0.25", "train", "plain,", "0"] in lines
    assert ["to", "run", "5,600", "0", "3.36e+05", "4"] in lines
    assert " ".join(lines[-1]) == "the longest chain of steps to run takes 45 min"
    assert not toy.output.exists() and not toy.notes()


def test_a_budget_counts_generation_and_what_was_measured(toy: Toy) -> None:
    content = toy.small()
    think = {
        "command": [str(STEP), "think", "{output}"],
        "cost": {"tokens": 500, "flops": "2 * 10 * tokens", "generated": True, "measured_tokens": "result.json:tokens"},
    }  # fmt: skip
    content["steps"] = {"think": think, **content["steps"]}
    content["steps"]["train"]["command"] += ["--from", "{think}"]
    content["budget"] = {"tokens": 1800}
    toy.write(content)
    with pytest.raises(UserError, match=r"budget.tokens: 1800, and the study takes 1900"):
        toy.run()
    content["budget"] = {"tokens": 1900, "results": [{"tokens": 1700, "trained_tokens": 1200, "flops": 82000}]}
    toy.write(content)
    toy.run(dry_run=True)
    toy.run(scale=TWO)
    assert toy.new_starts()["think:"] == 1
    with (toy.output / "report/results.csv").open() as file:
        assert {(row["trained_tokens"], row["generated_tokens"], row["flops"]) for row in csv.DictReader(file)} == {
            ("1200.0", "100.0", "74000.0")
        }
    with pytest.raises(UserError, match=r"budget.results.0.tokens: 1700, and plain, short, 0 takes 1300"):
        toy.run()
    content["budget"]["results"] = [
        {"only": {"sft": ["long"]}, "tokens": 1300},
        {"only": {"sft": ["long"]}, "flops": 1},
    ]
    toy.write(content)
    with pytest.raises(UserError, match=r"budget.results.1.flops: 1, and plain, long, 0 takes 7.4e\+04"):
        toy.run()


def test_a_copy_of_the_folder_alone_gives_the_same_report(toy: Toy, tmp_path: Path) -> None:
    recipe, content = tmp_path / "recipe.yaml", toy.small()
    recipe.write_text("steps: 1")
    content["steps"]["tune"]["inputs"] = [str(recipe)]
    toy.write(content)
    toy.run(scale=TWO)
    before = {path.name: path.read_bytes() for path in (toy.output / "report").iterdir()}
    copy = tmp_path / "elsewhere/copy"
    shutil.copytree(toy.output, copy, ignore=shutil.ignore_patterns("report"))
    shutil.rmtree(toy.output)
    recipe.write_text("steps: 2")
    (toy.folder / "study.yaml").unlink()
    for _ in range(2):
        run_study(StudyOptions(copy / "study.yaml", copy, report=True))
        assert {path.name: path.read_bytes() for path in (copy / "report").iterdir()} == before
        recipe.unlink(missing_ok=True)


def test_what_was_removed_is_made_again_only_where_it_is_needed(toy: Toy) -> None:
    toy.write(toy.small())
    toy.run(scale=TWO)
    values = toy.values()
    toy.new_starts()
    [train] = toy.output.glob("train/plain_0-*/output")
    shutil.rmtree(train)
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter()  # all that needs it has been done
    [tune] = toy.output.glob("tune/plain_short_0-*/output/result.json")
    shutil.rmtree(tune.parent)
    toy.run(scale=TWO)
    assert toy.new_starts() == Counter({"train:p0": 1, "tune:s": 1}) and toy.values() == values


def test_what_was_removed_and_is_made_again_in_part_is_not_done(toy: Toy, tmp_path: Path) -> None:
    content, script = toy.small(), tmp_path / "own.py"
    script.write_text("import os, pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir()\n"
                      "(folder / 'half').touch()\nassert not os.path.exists(os.environ['TOY_FOLDER'] + '/stop')\n"
                      "(folder / 'result.json').write_text('{\"score\": 0.5}')\n")  # fmt: skip
    content["steps"]["train"] |= {"command": [str(script), "{output}", "{pre.value}{seed}"], "clean": True}
    toy.write(content)
    toy.run(scale=TWO)
    values = toy.values()
    for output in toy.output.glob("*/*/output"):
        shutil.rmtree(output)
    (stop := toy.folder / "stop").mkdir()
    with pytest.raises(Fault, match=r"1 step failed: train plain, 0; 2 that need them did not run"):
        toy.run(scale=TWO)
    stop.rmdir()
    toy.run(scale=TWO)
    assert toy.values() == values


def test_a_step_is_refused_where_its_code_has_changed_since_the_study_was_started(toy: Toy, tmp_path: Path) -> None:
    script, content = tmp_path / "own.py", toy.small()
    shutil.copy(STEP, script)
    content["steps"]["tune"]["command"][0] = str(script)
    content["factors"]["sft"].pop("long")
    toy.write(content)
    (hold := toy.folder / "hold train").touch()
    study = toy.start()
    wait_until(lambda: study.poll() is not None or len(toy.notes()) == 1)
    script.write_text(script.read_text().replace("65535", "65536"))
    hold.unlink()
    printed, _ = study.communicate(timeout=300)
    assert study.returncode == 1 and f"changed since the study was started: {script}" in printed, printed
    toy.new_starts()
    toy.run()  # it has left nothing, so that there is nothing to ask about
    assert toy.new_starts() == Counter({"tune:s": 1})


def test_corrected_code_of_a_failed_step_is_run_without_a_question(toy: Toy, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text("import sys\nraise SystemExit('error: no such thing')\n")
    step = {"command": [str(script), "{output}"], "results": {"metrics": {"m": "m"}}}
    toy.write({"title": "T", "factors": {"seed": [0]}, "steps": {"only": step}})
    with pytest.raises(Fault, match="1 step failed"):
        toy.run()
    code = "import pathlib, sys\nplace = pathlib.Path(sys.argv[1])\nplace.mkdir(exist_ok=True)\n"
    script.write_text(code + "raise SystemExit('error: half of it')\n")
    with pytest.raises(Fault, match="1 step failed"):
        toy.run()
    script.write_text(code + "(place / 'results.json').write_text('{\"m\": 1}')\n")
    with pytest.raises(UserError, match=rf"1 step, such as only, ran with other code: {script}; --code"):
        toy.run()  # what it left might be resumed
    toy.run(code="keep")
    [folder] = [path.parent for path in toy.output.glob("only/*/done.json")]
    spec = json.loads((folder / "step.json").read_text())
    assert spec["code"] != spec["code_now"] and json.loads((folder / "done.json").read_text())["attempts"] == 2
    assert f"different versions of {script}" in (toy.output / "report/report.md").read_text().replace("\\", "")


def test_changed_code_is_asked_about(toy: Toy, tmp_path: Path) -> None:
    script, content = tmp_path / "own.py", toy.small()
    shutil.copy(STEP, script)
    content["steps"]["train"]["command"][0] = str(script)
    toy.write(content)
    toy.run()
    values = toy.values()
    toy.new_starts()
    script.write_text(f"# a comment changes nothing\n{script.read_text()}")
    toy.run()
    script.write_text(script.read_text().replace("65535", "65536"))
    with pytest.raises(UserError, match=rf"3 steps, such as train plain, 0, ran with other code: {script}; --code"):
        toy.run()
    toy.run(code="keep")
    assert toy.new_starts() == Counter() and toy.values() == values
    toy.run(code="rerun")
    assert sum(toy.new_starts().values()) == 3 and toy.values() != values
    toy.run()
    assert toy.new_starts() == Counter()


def test_a_changed_input_runs_what_reads_it_again(toy: Toy, tmp_path: Path) -> None:
    recipe, content = tmp_path / "recipe.yaml", toy.small()
    recipe.write_text("steps: 1")
    content["steps"]["tune"]["command"][-1] = str(recipe)
    content["factors"].pop("sft")
    toy.write(content)
    toy.run()
    toy.new_starts()
    recipe.write_text("steps: 2")
    toy.run()
    assert toy.new_starts() == Counter({f"tune:{recipe}": 1})


def test_what_an_interrupted_step_left_is_removed_where_it_cannot_resume(toy: Toy) -> None:
    program = "import pathlib, sys; place = pathlib.Path(sys.argv[1]); place.mkdir(); (place / 'x').touch(); 1 / 0"
    content = {"title": "T", "factors": {"seed": [0]}, "steps": {"only": {"command": ["-c", program, "{output}"]}}}
    toy.write(content)
    for _ in range(2):
        with pytest.raises(Fault):
            toy.run()
    [log] = toy.output.glob("only/*/logs/task_00000.log")
    assert "FileExistsError" in log.read_text()
    content["steps"]["only"]["clean"] = True
    toy.write(content)
    with pytest.raises(Fault):
        toy.run()
    assert "ZeroDivisionError" in log.read_text().rpartition("--- start")[2]


def test_a_step_that_does_not_write_its_outputs_has_failed(toy: Toy) -> None:
    content = {"title": "T", "factors": {"seed": [0]}, "steps": {"only": {"command": ["-c", ""], "outputs": ["model"]}}}
    toy.write(content)
    with pytest.raises(Fault, match="1 step failed"):
        toy.run()
    assert "has not written model" in next(toy.output.glob("only/*/logs/task_00000.log")).read_text()
    content["steps"]["only"] = {"command": ["-c", "", "{output}"]}
    toy.write(content)
    with pytest.raises(Fault, match="1 step failed"):
        toy.run()
    assert "has written nothing to its {output}" in "".join(
        path.read_text() for path in toy.output.glob("only/*/logs/task_00000.log")
    )


def test_a_step_may_run_a_script_that_another_has_written(toy: Toy) -> None:
    script = "import sys; open(sys.argv[1], 'w')"
    write = f"import pathlib, sys; pathlib.Path(sys.argv[1] + '.py').write_text({script!r})"
    steps = {"write": {"command": ["-c", write, "{output}"]}, "use": {"command": ["{write}.py", "{output}"]}}
    toy.write({"title": "T", "factors": {"seed": [0]}, "steps": steps})
    toy.run()
    assert len(toy.records()) == 2


def test_the_time_of_a_stopped_attempt_counts(toy: Toy) -> None:
    toy.write(toy.small())
    (hold := toy.folder / "hold train").touch()
    study = toy.start()
    wait_until(lambda: study.poll() is not None or len(toy.notes()) == 1)
    study.send_signal(signal.SIGTERM)
    study.communicate(timeout=300)
    hold.unlink()
    toy.run()
    [attempts] = toy.output.glob("train/*/attempts.jsonl")
    codes = [line.get("exit_code") for line in map(json.loads, attempts.read_text().splitlines()) if "seconds" in line]
    assert codes == [128 + signal.SIGTERM, 0]
    assert sorted(record["attempts"] for record in toy.records().values()) == [1, 1, 2]


def test_resources_of_a_step_are_those_of_a_job(toy: Toy) -> None:
    content = toy.content()
    content["steps"]["tune"]["scale"] = {"num_workers": 2}
    toy.write(content)
    with pytest.raises(UserError, match=r"steps.tune.scale.num_workers: unknown; known are gpus_per_task"):
        toy.run(dry_run=True)


def test_a_file_in_the_place_of_the_output_folder_is_refused(toy: Toy) -> None:
    toy.output.touch()
    with pytest.raises(UserError, match=r"runs: is a file; give a folder"):
        toy.run()


@pytest.mark.slow
def test_one_study_runs_once_at_a_time(toy: Toy) -> None:
    from megatron_tpt.jobs.lock import exclusive

    with (
        exclusive(toy.output / ".study.lock", "it", timeout_s=1),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
    ):
        toy.run()
