"""A loss that is not finite, or jumps, on one rank in one step: what the recipe says happens, on all ranks."""

import json
from pathlib import Path

import pytest
from training_runs import Train

STEPS = ["--training.num_steps=8", "--checkpoint.save_interval=4"]


def exact(rows: list[dict]) -> list[list]:
    return [[row[name] for name in ("step", "loss", "grad_norm", "tokens")] for row in rows if row.get("grad_norm")]


def poisoned(train: Train, name: str, factor: str, *overrides: str) -> list[dict]:
    """A run of two ranks in whose step 6 the second one's losses are multiplied."""
    program = "poisoned_pretrain"
    return train(name, *STEPS, *overrides, f"--poison=1:6:{factor}", num_processes=2, program=program)


def test_a_bad_step_stops_the_run_and_is_diagnosed(train: Train, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0: BadStep.*step 6 is bad.*rank 1 \(samples 42 to 47 "):
        poisoned(train, "run", "nan")
    guilty = json.loads((tmp_path / "run/logs/bad-step-00000006.json").read_text())
    assert [one["rank"] for one in guilty if not one["loss_is_finite"]] == [1]
    assert any("word_embeddings" in name for name in guilty[1]["parameters"])
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000004"]


@pytest.mark.parametrize(
    ("policy", "factor", "skipped"),
    [
        (["--faults.on_nonfinite=skip"], "nan", "[6]"),
        (["--faults.on_nonfinite=rollback"], "nan", "[5-6]"),
        (["--faults.on_loss_spike=rollback"], "9", "[5-6]"),
    ],
    ids=["skip", "rollback", "spike"],
)
def test_the_run_goes_on_as_if_the_bad_data_had_been_passed_over(
    policy: list[str], factor: str, skipped: str, train: Train
) -> None:
    passed_over = train("passed-over", *STEPS, f"--training.skip_steps={skipped}", num_processes=2)
    assert exact(poisoned(train, "run", factor, *policy)) == exact(passed_over)


def test_a_run_does_not_go_back_for_ever(train: Train) -> None:
    with pytest.raises(AssertionError, match=r"BadStep.*step 6 is bad"):
        poisoned(train, "run", "nan", "--faults.on_nonfinite=rollback", "--faults.max_rollbacks=0")
