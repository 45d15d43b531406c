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
WHOLE_OPTIMIZER, BF16 = "--parallel.distributed_optimizer=false", "--training.dtype=bfloat16"
RECOMPUTE = {
    "attention": ["--training.recompute=selective"],
    "feed-forward": ["--training.recompute=selective", "--training.recompute_modules=[core_attn, mlp]"],
    "full": ["--training.recompute=full"],
    "block": ["--training.recompute=block", "--training.recompute_layers=1"],
}
# Every two of: precision, how the optimizer is split, recomputation, are together in one of them; for combined layouts,
# all but bf16 with an optimizer that is not split.
VARIANTS = {
    "fp32": [],
    "fp32-whole-recomputed": [WHOLE_OPTIMIZER, *RECOMPUTE["full"]],
    "bf16-whole": [BF16, WHOLE_OPTIMIZER],
    "bf16-recomputed": [BF16, *RECOMPUTE["full"]],
}
PARTLY_RECOMPUTED = {"fp32-selective": RECOMPUTE["feed-forward"], "fp32-block": RECOMPUTE["block"]}
FAST_CASES = [("fp32", layout) for layout in FAST]
FAST_CASES += [("fp32-whole-recomputed", "tp2-sequence"), ("bf16-recomputed", "dp2")]
ALL_CASES = [(one, layout) for one in VARIANTS for layout in LAYOUTS if layout in FAST or one != "bf16-whole"]
ALL_CASES += [(variant, layout) for variant in PARTLY_RECOMPUTED for layout in ("tp2-sequence", "pp2-interleaved")]
CASES = [pytest.param(*case, marks=() if case in FAST_CASES else slow) for case in ALL_CASES]
VARIANTS |= PARTLY_RECOMPUTED


def gathered(folder: Path, name: str, what: str = "gradients") -> dict[str, torch.Tensor]:
    """The gradients of the first step, or the weights at the end, put together from the pieces of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}.{what}-*.pt")):
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


def distances(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each tensor is from what it should be, relative to that."""
    assert ours.keys() == theirs.keys()
    return {key: float((ours[key] - value).norm() / value.norm()) for key, value in theirs.items()}


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_losses_gradients_and_weights_equal_those_of_one_process(
    variant: str, layout: str, train: Train, tmp_path: Path, single: dict, deep: dict
) -> None:
    """Of one that recomputes nothing. In bf16, of 8 bits, each layout rounds otherwise, and the weights drift apart."""
    precision = [BF16] if BF16 in VARIANTS[variant] else []
    if len(precision) not in single:
        metrics = train("single", *precision, program=GRADIENT_WORKER, changes=deep)
        single[len(precision)] = metrics, gathered(tmp_path, "single"), gathered(tmp_path, "single", "weights")
    losses, gradients, weights = single[len(precision)]
    num_processes, overrides = LAYOUTS[layout]
    arguments = {"num_processes": num_processes, "program": GRADIENT_WORKER, "changes": deep}
    metrics = train(layout, *overrides, *VARIANTS[variant], **arguments)

    of_losses, of_gradients, of_weights = (1e-3, 0.02, 0.03) if precision else (1e-5, 1e-5, 1e-5)
    assert len(metrics) == len(losses) == 10
    for ours, theirs in zip(metrics, losses, strict=True):
        for name in ("loss", "loss_document", "loss_thinking"):
            assert ours[name] == pytest.approx(theirs[name], rel=of_losses), f"step {ours['step']}: {name}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * of_losses)
    for what, expected, tolerance in (("gradients", gradients, of_gradients), ("weights", weights, of_weights)):
        found = distances(gathered(tmp_path, layout, what), expected)
        assert max(found.values()) <= tolerance, (what, found)


def test_the_distributed_optimizer_changes_nothing_but_where_the_state_is(train: Train) -> None:
    plain = train("plain", WHOLE_OPTIMIZER, num_processes=2)
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
    half = train("bf16", "--training.dtype=bfloat16")
    assert [m["loss"] for m in half] == pytest.approx([m["loss"] for m in full], rel=0.02)
    assert [m["loss"] for m in half] != [m["loss"] for m in full]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputing_activations_changes_nothing(recompute: str, train: Train, single: dict, tmp_path: Path) -> None:
    num_steps = "--training.num_steps=4"
    if "kept" not in single:
        single["kept"] = train("kept", num_steps, WHOLE_OPTIMIZER, program=GRADIENT_WORKER)
        single["kept gradients"] = gathered(tmp_path, "kept")
    metrics = train("again", num_steps, WHOLE_OPTIMIZER, *RECOMPUTE[recompute], program=GRADIENT_WORKER)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in single["kept"]], rel=1e-6)
    for key, gradient in gathered(tmp_path, "again").items():
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


@slow
@pytest.mark.parametrize("layout", ["tp2-sequence", "pp2"])
def test_biases_and_stretched_positions_train_alike_under_every_layout(
    layout: str, train: Train, tmp_path: Path, deep: dict
) -> None:
    changes = {
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_context": 16,
    }
    arguments = {"program": GRADIENT_WORKER, "changes": {**deep, "model": {**deep["model"], **changes}}}
    train("one", **arguments)
    num_processes, overrides = LAYOUTS[layout]
    train(layout, *overrides, num_processes=num_processes, **arguments)
    expected = gathered(tmp_path, "one")
    assert sum(key.endswith(".bias") for key in expected) == 4
    # The loss hardly depends on the keys' biases: Adam makes steps of full size of gradients that are mostly rounding.
    for what, tolerance in (("gradients", 1e-5), ("weights", 1e-4)):
        found = distances(gathered(tmp_path, layout, what), gathered(tmp_path, "one", what))
        assert max(found.values()) <= tolerance, (what, found)
