"""`--dry-run`: what a run needs, and what would be refused when it starts or resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training_runs import PRETRAIN, Workers

from megatron_tpt.config.load import load_recipe, recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training import devices
from megatron_tpt.training.describe import describe
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.memory import checkpoint_bytes, num_checkpoints

DryRun = Callable[..., str]


@pytest.fixture(scope="module")
def finished(recipe: dict, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The recipe file of a run that has done its four steps, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    content = {**recipe, "run": {"output_dir": str(folder / "run")}, "checkpoint": {"save_interval": 2}}
    content["training"] = {**recipe["training"], "num_steps": 4}
    content["optimizer"] = {"learning_rate": 1e-2, "schedule": "constant"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, workers.run(PRETRAIN, [str(path)], 1)


@pytest.fixture
def dry_run(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> DryRun:
    def run(*overrides: str) -> str:
        capsys.readouterr()
        assert prepare(*load_recipe(PretrainRecipe, [str(finished[0]), *overrides, "--dry-run"])) is None
        return capsys.readouterr().out

    return run


def test_a_run_ends_with_its_checkpoint_and_commands_that_exist(finished: tuple[Path, str]) -> None:
    path, output = finished
    checkpoint = path.parent / "run/checkpoints/step_00000004"
    end, export, finetune = output.splitlines()[-3:]
    assert end == f"finished: 4 steps, 1,024 tokens; checkpoint: {checkpoint}"
    words = export.removeprefix("next, to export: ").split()
    assert Path(words[1]).resolve().is_file() and words[2:4] == ["--checkpoint", str(checkpoint)]
    assert finetune.endswith(f"-m megatron_tpt.finetune FINETUNE.yaml --training.init_from={checkpoint}")


def test_a_run_folder_is_described_as_it_would_resume(dry_run: DryRun, finished: tuple[Path, str]) -> None:
    run = finished[0].parent / "run"
    assert "0 of 4 steps are left; nothing is left to do: raise training.num_steps" in dry_run()
    assert f"resumes from {run}/checkpoints/step_00000004: 2 of 6 steps are left" in dry_run("--training.num_steps=6")
    changed = dry_run("--training.num_steps=6", "--model.rotary_base=500", "--model.init_std=0.5")
    settings = f"warning: other settings than those of {run}/checkpoints/step_00000004 take effect after step 4: "
    assert f"{settings}model.rotary_base=500.0 (10000.0 there)\n" in changed
    assert "warning: model.init_std=0.5 (0.02 there) has no effect: the weights are those of" in changed
    elsewhere = dry_run(f"--run.output_dir={run}2", f"--training.init_from={run}/checkpoints/latest")
    assert f"starts in {run}2 from the weights of {run}/checkpoints/step_00000004" in elsewhere
    assert "starts from random weights" in dry_run(f"--run.output_dir={run}2")


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (["--run.seed=5"], "was written with run.seed=1234: resume with that, or start"),
        (
            ["--training.global_batch_size=4"],
            "was written with training.global_batch_size=8: .* --data.allow_change=true",
        ),
        (["--training.num_steps=3"], "is beyond training.num_steps=3"),
        (["--training.num_steps=1000"], r"another number of times through data\.train.*--data.allow_change=true"),
        (["--data.train=RECORDS"], "another data.train"),
        (["--model.hidden_size=64"], "was written with model.hidden_size=32: resume with that, or start"),
        (["--model.tie_embeddings=true"], "was written with model.tie_embeddings=false: resume"),
        (
            ["--optimizer.name=muon", "--parallel.distributed_optimizer=false"],
            "with parallel.distributed_optimizer=true, optimizer.name=adam: resume with those",
        ),
        (["--parallel.distributed_optimizer=false"], "with parallel.distributed_optimizer=true"),
        (
            ["--run.output_dir=NEW", "--training.init_from=CHECKPOINT", "--model.num_layers=4"],
            "has a model of model.num_layers=2",
        ),
    ],
)
def test_what_would_be_refused_is_refused(
    overrides: list[str], reported: str, dry_run: DryRun, finished: tuple[Path, str], records_path: Path, tmp_path: Path
) -> None:
    from megatron_tpt.indexing.index import index
    from megatron_tpt.indexing.options import IndexOptions

    if overrides == ["--data.train=RECORDS"]:
        source = tmp_path / "fewer.jsonl"
        source.write_text("".join(records_path.read_text().splitlines(keepends=True)[:200]))
        tokenizer = records_path.parent / "tokenizer"
        index(IndexOptions(input=[source], tokenizer=tokenizer, output=tmp_path / "fewer"))
        overrides = [f"--data.train={tmp_path / 'fewer'}"]
    names = {"NEW": tmp_path / "new", "CHECKPOINT": finished[0].parent / "run/checkpoints/latest"}
    for name, value in names.items():
        overrides = [override.replace(name, str(value)) for override in overrides]
    with pytest.raises(UserError, match=reported):
        dry_run(*overrides)


def test_a_damaged_checkpoint_is_not_resumed_from(finished: tuple[Path, str], dry_run: DryRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0].parent / "run", run, symlinks=True)
    next((run / "checkpoints/step_00000004").glob("*.distcp")).write_bytes(b"")
    text = dry_run(f"--run.output_dir={run}")
    assert f"warning: {run}/checkpoints/step_00000004 is damaged (" in text and "has 0 bytes in place of" in text
    assert f"resumes from {run}/checkpoints/step_00000002: 2 of 4 steps are left" in text
    with pytest.raises(UserError, match=r"step_00000004 is damaged"):
        dry_run(f"--run.output_dir={run}2", f"--training.init_from={run}/checkpoints/latest")
    (run / "checkpoints/step_00000002/checksums.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        dry_run(f"--run.output_dir={run}")


LARGE = {
    "model": {"preset": "llama3-8b"},
    "training": {"sequence_length": 8192, "global_batch_size": 512, "num_steps": 1000},
    "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "checkpoint": {"save_interval": 100, "keep_last": 2, "keep_every": 500},
    "data": {"train": "nowhere"},
}


def row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).strip()


def test_hours_follow_from_an_assumed_share_of_the_peak() -> None:
    recipe = recipe_from_dict(PretrainRecipe, LARGE)
    text = describe(recipe, 64, find_device("h100"))
    # 5.147e10 FLOPs per token x 4.194e9 tokens over 64 x 989.4 TFLOP/s x 40%: 8,523 s.
    assert row(text, "time at 40% MFU").startswith("2 h 22 min, 151.5 GPU-hours")
    assert row(describe(recipe, 64, find_device("h100"), 0.2), "time at 20% MFU").startswith("4 h 44 min, 303.0")
    assert "fits" in row(text, "device")
    assert "DOES NOT FIT" in row(describe(recipe, 2, find_device("a100")), "device")
    recipe.training.micro_batch_size = 2
    assert "is tight" in row(describe(recipe, 8, find_device("h100")), "device")
    with pytest.raises(UserError, match=r"--device=v100 is not known: give one of cpu, a100"):
        find_device("v100")


def test_a_cpu_is_not_measured_by_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    text = describe(recipe_from_dict(PretrainRecipe, LARGE), 64, find_device(None))
    assert "H100" not in text and "MFU" not in text and "GPU-hours" not in text
    assert "--device=h100 describes the run on that GPU" in row(text, "time")
    assert "DOES NOT FIT" in row(text, "device")
    reported = recipe_from_dict(PretrainRecipe, {**LARGE, "logging": {"peak_tflops": 1.0}})
    assert "1 TFLOP/s each: logging.peak_tflops" in describe(reported, 64, find_device(None))


def test_the_gpu_of_this_machine_is_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    device = find_device(None)
    assert (device.name, device.memory_bytes, device.is_gpu) == ("NVIDIA H200", 143771 << 20, True)
    program.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    assert not find_device(None).is_gpu


@pytest.mark.parametrize(
    ("changes", "bytes_per_parameter"),
    # Measured on checkpoints of this size, which have some kilobytes more.
    [
        ({"training": {"dtype": "bfloat16"}}, 77252981 / 5506304),
        ({"training": {"dtype": "float32"}}, 88265426 / 5506304),
        ({"training": {"dtype": "bfloat16"}, "optimizer": {"name": "muon"}}, 71991684 / 5506304),
        ({"training": {"dtype": "float32"}, "parallel": {"distributed_optimizer": False}}, 66207722 / 5506304),
    ],
)
def test_the_size_of_checkpoints_is_what_was_measured(changes: dict, bytes_per_parameter: float) -> None:
    model = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 8192}
    recipe = recipe_from_dict(PretrainRecipe, {"model": model, **changes})
    size = checkpoint_bytes(recipe) / recipe.model.num_parameters()
    assert size == pytest.approx(bytes_per_parameter, rel=0.005)


@pytest.mark.parametrize(
    ("checkpoint", "number"),
    [
        ({}, 1),
        ({"save_interval": 100}, 10),
        ({"save_interval": 300}, 4),  # 300, 600, 900 and the last
        ({"save_interval": 100, "keep_last": 2}, 3),
        ({"save_interval": 100, "keep_last": 2, "keep_every": 500}, 4),
        ({"save_interval": 5000, "keep_last": 2}, 1),
    ],
)
def test_checkpoints_at_once_are_those_kept_and_the_one_being_written(checkpoint: dict, number: int) -> None:
    assert num_checkpoints(recipe_from_dict(PretrainRecipe, {**LARGE, "checkpoint": checkpoint})) == number


def test_steps_and_epochs_that_differ_are_not_both_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_tpt.recipes import finetune

    class Counts:
        rows = 40

    class Packed:
        counts = Counts()

    monkeypatch.setattr(finetune, "is_packed", lambda paths: True)
    monkeypatch.setattr(finetune.PackManifest, "read", lambda prefix: Packed())
    raw = {"data": {"train": ["a"]}, "training": {"num_epochs": 2, "num_steps": 7}}
    with pytest.raises(
        UserError, match=r"num_steps=7 and training.num_epochs=2 \(which takes 10 steps\) were both given"
    ):
        recipe_from_dict(FinetuneRecipe, raw).with_steps()
    for given in ({}, {"num_steps": 10}):
        raw["training"] = {"num_epochs": 2, **given}
        assert recipe_from_dict(FinetuneRecipe, raw).with_steps().training.num_steps == 10
        assert capsys.readouterr().out == "training.num_epochs=2 takes 10 steps\n"


def test_a_run_folder_that_cannot_be_written_is_a_mistake_of_one_line(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(UserError, match=r"run\.output_dir=.*: nothing can be written there \(") as error:
            prepare(*load_recipe(PretrainRecipe, [str(finished[0]), f"--run.output_dir={folder}"]))
        assert "\n" not in str(error.value)
