"""What is said of a run is what its files hold, in every state it can be in."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from monitored import NOW, checkpoint, heartbeat, lock, metrics, running, write

from megatron_tpt.monitoring import run_status
from megatron_tpt.monitoring.run_status import is_run, read_run


def test_a_run_that_trains_is_described_from_its_newest_report(tmp_path: Path) -> None:
    found = read_run(running(tmp_path), NOW)
    assert (found.kind, found.state, found.warnings) == ("run", "running", [])
    assert (found.step, found.num_steps, found.share) == (40, 100, 0.4)
    assert found.losses == {"loss": 2.5, "loss_document": 2.75, "loss_thinking": 2.25, "validation_loss": 2.6}
    assert (found.tokens, found.tokens_per_s, found.mfu) == (81920, 1234.5, 0.415)
    assert found.remaining_s == 600, "630 s as of 30 s ago"
    assert (found.checkpoint_step, found.checkpoint_age_s) == (40, 600)
    assert found.heartbeat_age_s == 5


@pytest.mark.parametrize(
    ("phase", "beat_age_s", "held_since_s", "lock_age_s", "state"),
    [
        ("forward", 5, 3600, 3, "running"),
        ("forward", 80, 3600, 3, "running"),  # a busy file system
        ("forward", 300, 3600, 3, "silent"),  # a hang: the lock's own thread lives
        ("forward", 300, 3600, 300, "silent"),  # killed, or its node is lost
        ("forward", 300, None, None, "failed"),
        ("done", 300, None, None, "finished"),
        ("done", 1, 3600, 3, "finished"),  # about to end
        ("stopped", 300, None, None, "stopped"),
        ("stopped", 300, 60, 3, "starting"),  # resumed, and not yet at its first heartbeat
        ("forward", 300, 60, 3, "starting"),
        ("forward", 300, 200, 150, "silent"),  # resumed, and killed before it
        (None, None, 60, 3, "starting"),
        (None, None, 200, 150, "silent"),
        (None, None, None, None, "failed"),
    ],
)
def test_the_state_follows_from_heartbeat_and_lock(
    phase: str | None,
    beat_age_s: float | None,
    held_since_s: float | None,
    lock_age_s: float | None,
    state: str,
    tmp_path: Path,
) -> None:
    if phase is not None and beat_age_s is not None:
        heartbeat(tmp_path, phase=phase, age_s=beat_age_s)
    if held_since_s is not None and lock_age_s is not None:
        lock(tmp_path, since_s=held_since_s, age_s=lock_age_s)
    found = read_run(tmp_path, NOW)
    assert found.state == state
    assert found.remaining_s is None
    needs_someone = state in ("silent", "failed")
    assert len(found.warnings) == needs_someone


def test_what_ended_it_or_holds_it_up_is_a_warning(tmp_path: Path) -> None:
    run = running(tmp_path)
    heartbeat(run, rank=1, age_s=200)
    heartbeat(run, rank=2, age_s=4000)  # of an earlier start with more ranks
    slow = {"step": 50, "loss": None, "slowest_rank": 3.0, "slowest_rank_ratio": 1.8, "data_wait_fraction": 0.25}
    metrics(run, slow)
    (run / "logs/hang-20270115-080000").mkdir()
    write(run / "logs/bad-step-00000012.json", [])
    (run / "checkpoints/damaged-step_00000030").mkdir()
    warnings = read_run(run, NOW).warnings
    assert [warning.partition(" ago")[0].rstrip("0123456789 shmind") for warning in warnings[-3:]] == [
        "hung",
        "had a bad step",
        "found a damaged checkpoint",
    ]
    assert warnings[-1].endswith("ago: checkpoints/damaged-step_00000030")
    assert warnings[:-3] == [
        "rank 1 on node1 shows no sign of life for 3 min",
        "loss was not finite in the last report",
        "rank 3 takes 1.8 times as long as the median",
        "25% of the time waits for data: raise data.num_workers",
    ]
    heartbeat(run, age_s=1000)
    assert read_run(run, NOW).warnings[0] == "no sign of life for 17 min: it hangs, was killed, or its node is lost"
    (run / "stop").touch()
    assert f"asked to stop: remove {run / 'stop'} to train on" in read_run(run, NOW).warnings
    (run / "run.lock").unlink()
    assert read_run(run, NOW).warnings[0] == "ended in step 41 (forward): its output says why"


def test_a_start_that_takes_long_is_a_warning(tmp_path: Path) -> None:
    for since_s, warnings in ((500, []), (1200, ["started 20 min ago, and has no heartbeat yet"])):
        lock(tmp_path, since_s=since_s)
        found = read_run(tmp_path, NOW)
        assert (found.state, found.warnings) == ("starting", warnings)


def test_a_disk_without_room_for_a_checkpoint_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running(tmp_path)
    (checkpoint(run, 40) / "weights.distcp").write_bytes(bytes(5000))
    usage = namedtuple("usage", "total used free")
    for free, is_tight in ((6000, False), (4000, True)):
        monkeypatch.setattr(run_status.shutil, "disk_usage", lambda path, free=free: usage(9, 9, free))
        assert bool([line for line in read_run(run, NOW).warnings if "GiB free" in line]) == is_tight


def test_files_that_are_being_written_or_damaged_are_no_error(tmp_path: Path) -> None:
    run = running(tmp_path)
    (run / "heartbeat.json").write_text('{"rank": 0, "ti')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (run / "run.yaml").write_text("a: [")
    found = read_run(run, NOW)
    assert (found.step, found.losses["loss"], found.num_steps) == (40, 2.5, None)
    assert read_run(tmp_path / "nothing", NOW).state == "failed" and not is_run(tmp_path / "nothing")


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running(tmp_path)
    metrics(run, *({"step": step, "loss": float(step), "padding": "x" * 900} for step in range(3000)))
    size = (run / "metrics.jsonl").stat().st_size
    assert size > 2 * run_status._TAIL_BYTES
    assert read_run(run, NOW).losses == {"loss": 2999.0}
    shutil.rmtree(run / "checkpoints")
    assert read_run(run, NOW).checkpoint_step is None
