"""Every parallel layout trains the same model: same losses, same gradients, and to the bit the same when run again."""

import shutil
from pathlib import Path

import pytest
import torch
from training_runs import Train

GRADIENT_WORKER = "gradient_worker"
TP2, SP = "--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=true"
PP2, PP4 = "--parallel.pipeline_parallel_size=2", "--parallel.pipeline_parallel_size=4"
INTERLEAVED = "--parallel.virtual_pipeline_parallel_size=2"
UNEVEN = "--parallel.first_stage_layers=1"
OVERLAP = "--parallel.overlap_grad_reduce=true"
slow = pytest.mark.slow
# Name: processes and settings. The fast ones cover each part once, the slow ones the products.
FAST = {
    "tp2": (2, [TP2]),
    "tp2-sequence": (2, [TP2, SP]),
    "pp2": (2, [PP2]),
    "pp2-interleaved": (2, [PP2, INTERLEAVED]),
    "pp2-uneven": (2, [PP2, UNEVEN]),
    "dp2": (2, []),
    "dp2-overlap": (2, [OVERLAP]),
}
SLOW = {
    "tp2-pp2": (4, [TP2, PP2]),
    "tp2-sequence-pp2": (4, [TP2, SP, PP2]),
    "tp2-dp2": (4, [TP2]),
    "tp2-sequence-dp2": (4, [TP2, SP]),
    "pp2-dp2": (4, [PP2]),
    "pp2-dp2-other-order": (4, [PP2, "--parallel.rank_order=tp-cp-pp-dp"]),
    "pp2-interleaved-dp2": (4, [PP2, INTERLEAVED]),
    "pp2-interleaved-dp2-overlap": (4, [PP2, INTERLEAVED, OVERLAP]),
    "tp2-sequence-pp2-interleaved": (4, [TP2, SP, PP2, INTERLEAVED]),
    "pp4": (4, [PP4]),
    "tp2-pp2-dp2": (8, [TP2, PP2]),
    "tp2-sequence-pp2-dp2": (8, [TP2, SP, PP2]),
    "tp2-sequence-pp2-interleaved-dp2": (8, [TP2, SP, PP2, INTERLEAVED]),
}
LAYOUTS = FAST | SLOW
NAMES = [*FAST, *(pytest.param(name, marks=slow) for name in SLOW)]
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
def single() -> dict:
    """Filled by the first test that needs it: the single-process run's metrics and gradients."""
    return {}


@pytest.fixture(scope="module")
def deep(recipe: dict) -> dict:
    """Four layers, of 10 steps: enough for two stages of two pieces each."""
    training = {**recipe["training"], "num_steps": 10, "micro_batch_size": 1}
    return {"model": {**recipe["model"], "num_layers": 4}, "training": training}


@pytest.mark.parametrize("layout", NAMES)
def test_losses_and_gradients_equal_those_of_one_process(
    layout: str, train: Train, tmp_path: Path, single: dict, deep: dict
) -> None:
    if not single:
        single["metrics"] = train("single", WHOLE_GRADIENTS, program=GRADIENT_WORKER, changes=deep)
        single["gradients"] = gathered_gradients(tmp_path, "single")
    num_processes, overrides = LAYOUTS[layout]
    arguments = {"num_processes": num_processes, "program": GRADIENT_WORKER, "changes": deep}
    metrics = train(layout, *overrides, WHOLE_GRADIENTS, **arguments)

    assert len(metrics) == len(single["metrics"]) == 10
    for ours, theirs in zip(metrics, single["metrics"], strict=True):
        for name in ("loss", "loss_document", "loss_thinking"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), f"step {ours['step']}: {name}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    gradients = gathered_gradients(tmp_path, layout)
    assert gradients.keys() == single["gradients"].keys()
    for key, expected in single["gradients"].items():
        assert (gradients[key] - expected).norm() <= 1e-5 * expected.norm(), key


@pytest.mark.parametrize("layout", [pytest.param(name, marks=slow) for name in LAYOUTS if name != "single"])
def test_bf16_and_the_distributed_optimizer_train_alike_under_every_layout(
    layout: str, train: Train, single: dict, deep: dict
) -> None:
    precise = ("--training.dtype=bf16", "--training.recompute=full")
    if "bf16" not in single:
        single["bf16"] = train("single", *precise, changes=deep)
    num_processes, overrides = LAYOUTS[layout]
    metrics = train(layout, *overrides, *precise, num_processes=num_processes, changes=deep)
    # bf16 has 8 bits of mantissa, and each layout sums in another order.
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in single["bf16"]], rel=0.01)


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


RECOMPUTE = {
    "attention": ["--training.recompute=selective"],
    "feed-forward": ["--training.recompute=selective", "--training.recompute_modules=[core_attn, mlp]"],
    "full": ["--training.recompute=full"],
    "block": ["--training.recompute=block", "--training.recompute_layers=1"],
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputing_activations_changes_nothing(recompute: str, train: Train, single: dict, tmp_path: Path) -> None:
    num_steps = "--training.num_steps=4"
    if "kept" not in single:
        single["kept"] = train("kept", num_steps, WHOLE_GRADIENTS, program=GRADIENT_WORKER)
        single["kept gradients"] = gathered_gradients(tmp_path, "kept")
    metrics = train("again", num_steps, WHOLE_GRADIENTS, *RECOMPUTE[recompute], program=GRADIENT_WORKER)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in single["kept"]], rel=1e-6)
    for key, gradient in gathered_gradients(tmp_path, "again").items():
        expected = single["kept gradients"][key]
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), key


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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("pp2-interleaved", "dp2"),
        pytest.param("dp2", "pp2-interleaved", marks=slow),
        pytest.param("pp2-uneven", "tp2-sequence", marks=slow),
        pytest.param("tp2-sequence-pp2-interleaved", "pp4", marks=slow),
        pytest.param("tp2-sequence-pp2-dp2", "pp2-interleaved-dp2", marks=slow),
    ],
)
def test_a_run_goes_on_along_the_same_curve_under_another_layout(
    first: str, second: str, train: Train, deep: dict, tmp_path: Path
) -> None:
    changes = {**deep, "checkpoint": {"save_interval": 5}}
    unbroken = train("unbroken", changes=changes)
    for layout in (first, second):
        num_processes, overrides = LAYOUTS[layout]
        moved = train("moved", *overrides, num_processes=num_processes, changes=changes)
        if layout == first:
            shutil.rmtree(tmp_path / "moved/checkpoints/step_00000010")
    assert [m["step"] for m in moved] == list(range(1, 11))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in moved] == pytest.approx([m[name] for m in unbroken], rel=1e-5), name
