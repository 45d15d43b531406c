"""A loss that is not finite, or jumps, on one rank in one step: what the recipe says happens, on all ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import Train

STEPS = ["--training.num_steps=8", "--checkpoint.save_interval=4"]


def exact(rows: list[dict]) -> list[list]:
    return [[row[name] for name in ("step", "loss", "grad_norm", "tokens")] for row in rows if row.get("grad_norm")]


def poisoned(train: Train, name: str, factor: str, *overrides: str, **changes: Any) -> list[dict]:
    """A run of two ranks in whose step 6 the second one's losses are multiplied."""
    program = "poisoned_pretrain"
    return train(name, *STEPS, *overrides, f"--poison=1:6:{factor}", num_processes=2, program=program, **changes)


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
def test_the_run_continues_as_if_the_bad_data_had_been_skipped(
    policy: list[str], factor: str, skipped: str, train: Train
) -> None:
    skipping = train("skipping", *STEPS, f"--training.skip_steps={skipped}", num_processes=2)
    assert exact(poisoned(train, "run", factor, *policy)) == exact(skipping)


def test_a_run_does_not_go_back_for_ever(train: Train) -> None:
    with pytest.raises(AssertionError, match=r"BadStep.*step 6 is bad"):
        poisoned(train, "run", "nan", "--faults.on_nonfinite=rollback", "--faults.max_rollbacks=0")


@pytest.fixture
def dropout(recipe: dict) -> dict:
    """Random numbers, which the second time must be those of the first."""
    return {"model": {**recipe["model"], "hidden_dropout": 0.1, "attention_dropout": 0.1}}


@pytest.mark.parametrize("factor", ["9", "9:noise"], ids=["to the bit", "but for rounding"])
def test_what_comes_again_on_the_same_batch_is_not_laid_to_the_hardware(
    factor: str, train: Train, dropout: dict
) -> None:
    with pytest.raises(AssertionError, match=r"step 6 is bad.*gave the same result on all ranks"):
        poisoned(train, "run", factor, "--faults.on_loss_spike=stop", changes=dropout)


def test_a_bad_step_that_cannot_be_computed_again_says_so(train: Train) -> None:
    with pytest.raises(AssertionError, match=r"step 6 is bad.*not computed again.*fp8=delayed") as caught:
        poisoned(train, "run", "nan:once:delayed")
    assert "TRANSIENT" not in str(caught.value)


@pytest.mark.parametrize("kind", ["losses", "gradients"])
def test_a_rank_that_gives_another_result_on_the_same_batch_is_named_and_training_goes_on_where_asked(
    kind: str, train: Train, dropout: dict
) -> None:
    unbroken = train("unbroken", *STEPS, num_processes=2, changes=dropout)
    once = "nan:once:gradients" if kind == "gradients" else "nan:once"
    ranks = r"0 \(.*\), 1 \(.*\)" if kind == "gradients" else r"1 \("
    with pytest.raises(AssertionError, match=rf"TRANSIENT.*a good result.*with other {kind} on rank {ranks}"):
        poisoned(train, "run", once, changes=dropout)
    recovered = poisoned(train, "recovered", once, "--faults.rerun=recover", changes=dropout)
    assert exact(recovered) == exact(unbroken)
