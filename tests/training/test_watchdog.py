"""Runs that hang: the rank that the others wait for is named, and every process ends."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import PRETRAIN, Train, read_metrics, start_ranks

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import RunConfig
from megatron_tpt.errors import UserError
from megatron_tpt.training.watchdog import Heartbeat, is_waiting, name_the_late, stack_of

from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

PATIENCE = ["--run.hang_timeout_s=5", "--run.first_step_timeout_s=600"]


def write_recipe(recipe: dict, folder: Path, num_steps: int) -> Path:
    path = folder / "run.yaml"
    training = {**recipe["training"], "num_steps": num_steps}
    path.write_text(yaml.safe_dump({**recipe, "training": training, "run": {"output_dir": str(folder / "run")}}))
    return path


def read_beat(path: Path) -> Heartbeat:
    return Heartbeat(**json.loads(path.read_text()))


def finish_all(processes: list[subprocess.Popen]) -> str:
    return "".join(process.communicate(timeout=120)[0] for process in processes)


def test_a_rank_that_stands_still_is_named(recipe: dict, tmp_path: Path) -> None:
    path, run_folder = write_recipe(recipe, tmp_path, num_steps=100_000), tmp_path / "run"
    first, second = start_ranks(PRETRAIN, path, *PATIENCE, num_processes=2)
    try:
        metrics = run_folder / "metrics.jsonl"
        while first.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.05)
        second.send_signal(signal.SIGSTOP)
        output = finish_all([first])
    finally:
        for process in (first, second):
            process.kill()
    assert first.returncode == 1, output
    assert "no progress for 5 s (run.hang_timeout_s): no sign of life from rank 1;" in output
    stacks = list(run_folder.glob("logs/hang-*/rank-*.txt"))
    assert [path.name for path in stacks] == ["rank-00000.txt"]
    # It waits in whichever collective of a step comes next: for gradients, for weights, for the sums of the metrics.
    assert "distributed_c10d.py" in stacks[0].read_text() and "in fit\n" in stacks[0].read_text()
    beat = read_beat(run_folder / "heartbeat.json")
    assert beat.num_steps == 100_000 and beat.step == read_metrics(run_folder)[-1]["step"]
    assert beat.waits and beat.pid == first.pid


@pytest.mark.slow
def test_a_rank_whose_data_does_not_come_is_named(recipe: dict, tmp_path: Path) -> None:
    path = write_recipe(recipe, tmp_path, num_steps=20)
    processes = start_ranks("stalling_pretrain", path, *PATIENCE, "--stall=read:0:6", num_processes=2)
    output = finish_all(processes)
    assert [process.returncode for process in processes] == [1, 1], output
    assert "the others wait for rank 0 (" in output and output.count("no progress for") == 1
    assert "after step 5: waiting for data, at training/stalling_pretrain.py:" in output
    stacks = {path.name: path.read_text() for path in (tmp_path / "run").glob("logs/hang-*/*")}
    assert stacks.keys() == {"rank-00000.txt", "rank-00001.txt"}
    assert "stalling_pretrain.py" in stacks["rank-00000.txt"] and "SlowDataset" not in stacks["rank-00001.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_pipeline_stage_that_stands_still_is_named(late: int, recipe: dict, tmp_path: Path) -> None:
    """On GPUs all stages stand in forward and backward, those that wait in torch.cuda.synchronize."""
    path = write_recipe(recipe, tmp_path, num_steps=20)
    options = [*PATIENCE, f"--stall=forward:{late}:6", "--parallel.pipeline_parallel_size=2"]
    processes = start_ranks("stalling_pretrain", path, *options, num_processes=2)
    output = finish_all(processes)
    assert [process.returncode for process in processes] == [1, 1], output
    assert f"the others wait for rank {late} (" in output and output.count("no progress for") == 1
    assert "after step 5: forward and backward, at training/stalling_pretrain.py:" in output
    assert "wait_for_ever" in output


def test_a_stage_is_seen_to_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Megatron Core's own stack, wherever in it a GPU is waited for."""
    began, is_over = threading.Event(), threading.Event()

    def synchronize() -> None:
        began.set()
        is_over.wait(60)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with platform.process_groups(ParallelConfig()):
        config = ModelParallelConfig(pipeline_dtype=torch.float32)
        stage = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
        nothing = {"tensor_send_next": None, "tensor_send_prev": None, "recv_prev": False, "recv_next": False}
        thread = threading.Thread(target=stage._communicate, kwargs={**nothing, "tensor_shape": (1,)})
        thread.start()
        assert began.wait(60) and thread.ident is not None
        assert is_waiting(stack_of(thread.ident))
        is_over.set()
        thread.join()
    assert not is_waiting(stack_of(threading.get_ident()))


def test_slow_validation_and_checkpoints_are_no_hang(train: Train, recipe: dict, tmp_path: Path) -> None:
    changes = {
        "data": {**recipe["data"], "validation": recipe["data"]["train"]},
        "training": {**recipe["training"], "num_steps": 3, "validation_interval": 3, "validation_steps": 2},
    }
    begin = time.monotonic()
    train("run", "--run.hang_timeout_s=3", "--stall=slow:0.5", changes=changes, program="stalling_pretrain")
    assert time.monotonic() - begin > 2 * 8 * 0.5  # each of the samples to validate on took that long
    beat = read_beat(tmp_path / "run/heartbeat.json")
    assert (beat.step, beat.num_steps, beat.phase) == (3, 3, "done")


def beats(*places: tuple[int, str, bool]) -> list[Heartbeat]:
    return [
        Heartbeat(rank, f"node{rank // 2}", 1, 0.0, step, 100, phase, waits, "data.py:7 read")
        for rank, (step, phase, waits) in enumerate(places)
    ]


WAITING = (7, "forward and backward", True)


@pytest.mark.parametrize(
    ("late", "named"),
    [
        ((7, "waiting for data", False), "the others wait for rank 3 (node1) after step 7: waiting for data, at data"),
        ((7, "forward and backward", False), "the others wait for rank 3 (node1) after step 7: forward and backward"),
        ((7, "between steps", False), "the others wait for rank 3 (node1) after step 7: between steps"),
        ((6, "update", True), "the others wait for rank 3 (node1) after step 6: update"),
        (WAITING, "all ranks are at the same place after step 7: forward and backward"),
    ],
)
def test_the_late_rank_is_distinguished_from_those_that_wait(late: tuple[int, str, bool], named: str) -> None:
    every = beats(WAITING, WAITING, (7, "update", False), late)
    if late == WAITING:
        every[2] = beats(WAITING, WAITING, WAITING)[2]
    assert name_the_late(every, 4).startswith(named)
    assert name_the_late(every[1:3], 4) == "no sign of life from rank 0, 3"


def test_a_timeout_above_that_of_collectives_is_refused() -> None:
    assert RunConfig(distributed_timeout_s=100).resolved_hang_timeout_s == 50
    assert RunConfig(hang_timeout_s=0).resolved_hang_timeout_s == float("inf")
    with pytest.raises(UserError, match=r"run\.hang_timeout_s=600.*lower it"):
        RunConfig(hang_timeout_s=600)
