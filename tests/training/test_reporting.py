"""Reports of a run: by source, over windows that kills cut in two, and traces."""

import contextlib
import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_disk import small_disk
from training_runs import Train, read_metrics

from megatron_tpt import platform
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.objectives.language_modeling import LanguageModeling
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.metrics_writer import MetricsWriter
from megatron_tpt.training.reporting import Window, _measure_power, console_line
from megatron_tpt.units import duration

EXACT = ("step", "loss", "loss_document", "loss_thinking", "perplexity", "tokens", "param_norm", "grad_norm")


def exact(rows: list[dict]) -> list[list]:
    return [[row[name] for name in EXACT] for row in rows]


def test_windows_of_a_run_resumed_twice_are_those_of_the_unbroken_run(train: Train, tmp_path: Path) -> None:
    """Checkpoints lie inside of the windows that are reported: no step may be missing in a mean, or be in two."""
    overrides = ["--training.num_steps=8", "--logging.log_interval=4", "--checkpoint.save_interval=3"]
    unbroken = train("run", *overrides, num_processes=2)
    assert [row["step"] for row in unbroken] == [4, 8]
    for last_step in (6, 3):
        for folder in (tmp_path / "run/checkpoints").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > last_step:
                shutil.rmtree(folder)
        resumed = train("run", *overrides, num_processes=2)
        # Ranks are added up at other moments.
        assert exact(resumed) == [pytest.approx(row, rel=1e-12) for row in exact(unbroken)]
        window = next(row for row in resumed if row["step"] > last_step)
        assert window["tokens_per_s"] == pytest.approx(4 * 8 * 32 / (4 * window["step_s"]))


def test_a_window_from_before_sums_had_names_is_resumed() -> None:
    times = {"step_seconds": [1.0], "data_wait_s": 0.0, "elapsed_s": 1.0, "num_tokens": 10}
    state = {"loss_sums": {"a": [6.0, 3.0, 8.0, 1.0], "gone": [1.0, 2.0, 0.0, 0.0]}, **times}
    objective = LanguageModeling(["a", "new"])
    with platform.process_groups(ParallelConfig()):
        window = Window.from_state(state, objective.sum_names)
    sums = dict(zip(objective.sum_names, window.sums.tolist(), strict=True))
    assert {name: value for name, value in sums.items() if value} == {
        **{"loss": 15.0, "tokens": 6.0, "thinking_loss": 8.0, "thinking_tokens": 1.0},
        **{"source_loss/a": 14.0, "source_tokens/a": 4.0},
    }


def test_norm_of_all_weights_is_the_same_under_any_layout(train: Train, recipe: dict, tmp_path: Path) -> None:
    """A tied matrix and the norms lie on several ranks, and count once."""
    changes = {"model": {**recipe["model"], "tie_embeddings": True}, "training": {**recipe["training"], "num_steps": 3}}
    layouts = {
        "single": [],
        "tensor": ["--parallel.tensor_parallel_size=2"],
        "pipeline": ["--parallel.pipeline_parallel_size=2"],
        "data": [],
    }
    norms = {}
    for name, overrides in layouts.items():
        rows = train(name, *overrides, changes=changes, num_processes=1 if name == "single" else 2)
        norms[name] = rows[-1]["param_norm"]
    assert norms == pytest.approx(dict.fromkeys(norms, norms["single"]), rel=1e-6)
    # Against torch's own sum over what export reads: vectors of ones (norms) and matrices drawn around 0.
    state = tmp_path / "single/checkpoints/latest"
    weights = {}
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(state), tmp_path / "weights.pt")
    for key, value in torch.load(tmp_path / "weights.pt", weights_only=False).items():
        if isinstance(value, torch.Tensor) and not key.startswith("optimizer"):
            weights[key] = value
    assert norms["single"] == pytest.approx(sum(v.double().square().sum().item() for v in weights.values()) ** 0.5)


def test_profile_holds_the_steps_and_ranks_asked_for(train: Train, tmp_path: Path) -> None:
    overrides = ["--training.num_steps=4", "--profiling.first_step=2", "--profiling.num_steps=2"]
    train("run", *overrides, "--profiling.ranks=[1]", num_processes=2)
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps-2-3-rank-1.trace.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert any("aten::" in name for name in names)
    num_updates = sum(name.startswith("Optimizer.step") for name in names)
    assert num_updates == 2


def test_a_wish_that_cannot_be_met_is_refused(train: Train, recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"profiling\.memory records a GPU's memory, and there is no GPU"):
        train("memory", "--profiling.first_step=2", "--profiling.memory=true")
    with pytest.raises(AssertionError, match=r"there is no rank 3 among 1"):
        train("rank", "--profiling.first_step=2", "--profiling.ranks=[0,3]")
    for package in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(UserError, match=rf"logging\.{package}_project needs the package {package}: pip install"):
            recipe_from_dict(PretrainRecipe, {**recipe, "logging": {f"{package}_project": "p"}}).check(1)


def test_the_console_shows_what_is_worth_a_look() -> None:
    values = {"loss": 1.25, "loss_thinking": 1.5, "learning_rate": 3e-4, "grad_norm": 0.5, "tokens_per_s": 12345.6}
    values |= {"tflops_per_device": 440.4, "mfu": 0.445, "data_wait_fraction": 0.002, "remaining_s": 7 * 3600 + 300}
    assert console_line(values | {"memory_reserved_gib": 61.23}) == (
        "loss 1.2500  loss_thinking 1.5000  lr 3.000e-04  grad norm 0.500  12,346 tokens/s  440 TFLOP/s/device  "
        "MFU 44.5%  data wait 0.2%  61.2 GiB  7 h 05 min left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (99.6, "100 s"), (720, "12 min"), (11100, "3 h 05 min"), (198000, "2 d 07 h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_metrics_of_a_full_disk_are_written_once_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"run": {"output_dir": str(tmp_path / "disk" / "run")}})
    with small_disk(tmp_path / "disk", 64 << 10):
        recipe.run.output_dir.mkdir()
        writer = MetricsWriter(recipe, resumed_step=0)
        writer.write(1, {"loss": 1.0})
        filler = tmp_path / "disk" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        for step in range(2, 202):
            writer.write(step, {"loss": 1.0 / step})
        writer.sync()
        assert (recipe.run.output_dir / "metrics.jsonl").read_bytes().count(b"\n") < 201
        warnings = capfd.readouterr().out
        assert warnings.count("metrics.jsonl cannot be written (No space left on device)") == 1
        assert "TensorBoard ends at step" in warnings
        filler.unlink()
        writer.close()
        assert [row["step"] for row in read_metrics(recipe.run.output_dir)] == list(range(1, 202))


def test_power_that_cannot_be_read_costs_a_metric_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class NVMLError(Exception):
        """As nvidia-ml-py has it: of a part of a GPU (MIG), for one."""

    def refuse() -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    assert _measure_power() == _measure_power() == {}
    assert capfd.readouterr().out == "warning: gpu_power_w is omitted from the metrics: Not Supported\n"
