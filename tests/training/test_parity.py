"""Every parallel layout trains the same model: same losses, same gradients, and to the bit the same when run again."""

from pathlib import Path

import pytest
import torch
from training_runs import Train

GRADIENT_WORKER = "gradient_worker"
LAYOUTS = {
    "tp2": (2, ["--parallel.tensor_parallel_size=2"]),
    "tp2-sequence": (2, ["--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=true"]),
    "pp2": (2, ["--parallel.pipeline_parallel_size=2"]),
    "dp2": (2, []),
    "tp2-pp2": (4, ["--parallel.tensor_parallel_size=2", "--parallel.pipeline_parallel_size=2"]),
}
# The distributed optimizer leaves each rank with its own part of the reduced gradients.
WHOLE_GRADIENTS = "--parallel.distributed_optimizer=false"


def gathered_gradients(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The gradient of every matrix of the model, put together from the pieces of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}.gradients-*.pt")):
        for key, shape, offset, piece in torch.load(path):
            target = whole.setdefault(key, torch.full(shape, torch.nan))
            num_stacked = len(shape) - piece.dim()  # leading axes that count layers
            place = tuple(slice(o, o + n) for o, n in zip(offset[num_stacked:], piece.shape, strict=True))
            target[(*offset[:num_stacked], *place)] = piece
    assert whole and not any(gradient.isnan().any() for gradient in whole.values())
    return whole


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Filled by the first test that needs it: the single-process run's metrics and gradients."""
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_equal_those_of_one_process(
    layout: str, train: Train, tmp_path: Path, single: dict
) -> None:
    if not single:
        single["metrics"] = train("single", WHOLE_GRADIENTS, program=GRADIENT_WORKER)
        single["gradients"] = gathered_gradients(tmp_path, "single")
    num_processes, overrides = LAYOUTS[layout]
    metrics = train(layout, *overrides, WHOLE_GRADIENTS, num_processes=num_processes, program=GRADIENT_WORKER)

    assert len(metrics) == len(single["metrics"]) == 20
    for ours, theirs in zip(metrics, single["metrics"], strict=True):
        for name in ("loss", "loss_document", "loss_thinking"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), f"step {ours['step']}: {name}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    gradients = gathered_gradients(tmp_path, layout)
    assert gradients.keys() == single["gradients"].keys()
    for key, expected in single["gradients"].items():
        assert (gradients[key] - expected).norm() <= 1e-5 * expected.norm(), key


def test_the_distributed_optimizer_changes_nothing_but_where_the_state_is(train: Train) -> None:
    plain = train("plain", WHOLE_GRADIENTS, num_processes=2)
    split = train("split", num_processes=2)
    assert [m["loss"] for m in split] == pytest.approx([m["loss"] for m in plain], rel=1e-6)


def test_a_second_run_is_identical_to_the_bit(train: Train) -> None:
    changes = {"model": {"num_layers": 2, "hidden_size": 32, "hidden_dropout": 0.1, "attention_dropout": 0.1}}
    first, second = (
        train(name, "--parallel.tensor_parallel_size=2", num_processes=2, changes=changes) for name in ("one", "two")
    )
    exact = ("step", "loss", "loss_document", "loss_thinking", "grad_norm", "learning_rate", "tokens")
    assert [[m[name] for name in exact] for m in first] == [[m[name] for name in exact] for m in second]


def test_bf16_follows_fp32(train: Train) -> None:
    full = train("fp32")
    half = train("bf16", "--training.dtype=bf16")
    assert [m["loss"] for m in half] == pytest.approx([m["loss"] for m in full], rel=0.02)
    assert [m["loss"] for m in half] != [m["loss"] for m in full]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_loss(recompute: str, train: Train) -> None:
    kept = train("kept")
    computed_again = train("again", f"--training.recompute={recompute}")
    assert [m["loss"] for m in computed_again] == pytest.approx([m["loss"] for m in kept], rel=1e-6)


def test_tied_embeddings_are_one_matrix_on_both_ends_of_a_pipeline(train: Train, recipe: dict) -> None:
    changes = {"model": {**recipe["model"], "tie_embeddings": True}}
    whole = train("whole", changes=changes)
    split = train("split", "--parallel.pipeline_parallel_size=2", num_processes=2, changes=changes)
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in split] == pytest.approx([m[name] for m in whole], rel=1e-5)


def test_reading_ahead_and_smaller_micro_batches_change_nothing(train: Train) -> None:
    plain = train("plain")
    ahead = train("ahead", "--data.num_workers=1", "--training.micro_batch_size=1")
    assert [m["loss"] for m in ahead] == pytest.approx([m["loss"] for m in plain], rel=1e-6)
