"""Memory per rank: what holds tensors is counted to the byte, activations by formulas worked out by hand."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from training_runs import Train

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.models.sizes import stage_parameters
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.memory import (
    Memory,
    estimate_memory,
    micro_batches_in_flight,
    peak_of,
    stage_activations,
    tokens_per_s_bound,
)

TP2, PP2 = "--parallel.tensor_parallel_size=2", "--parallel.pipeline_parallel_size=2"
LAYOUTS = {
    "single": (1, ["--training.dtype=float32"]),
    "tensor-and-uneven-pipeline": (4, [TP2, PP2, "--parallel.first_stage_layers=1"]),
    "data": (2, []),
    "data-not-distributed": (2, ["--parallel.distributed_optimizer=false"]),
    "data-muon": (2, ["--optimizer.name=muon"]),
    "tensor-muon-not-distributed": (2, [TP2, "--parallel.distributed_optimizer=false", "--optimizer.name=muon"]),
    "interleaved-tied": (2, [PP2, "--parallel.virtual_pipeline_parallel_size=2", "--model.tie_embeddings=true"]),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if size > 2 else name for name, (size, _) in LAYOUTS.items()]
)
def test_weights_gradients_and_optimizer_state_are_counted_to_the_byte(
    layout: str, train: Train, recipe: dict, tmp_path: Path
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    changes = {
        "model": {**recipe["model"], "num_layers": 4, "qkv_bias": True, "qk_norm": True},
        "training": {**recipe["training"], "num_steps": 1, "dtype": "bfloat16"},
        "optimizer": {},
    }
    train("run", *overrides, changes=changes, num_processes=num_processes, program="memory_worker")
    resolved = recipe_from_dict(PretrainRecipe, yaml.safe_load((tmp_path / "run/run.yaml").read_text()))
    data_parallel_size = resolved.parallel.data_parallel_size(num_processes)
    expected = estimate_memory(resolved, data_parallel_size)

    optimizer: dict[int, int] = defaultdict(int)
    for path in tmp_path.glob("run.memory-*.json"):
        found = json.loads(path.read_text())
        stage = found["stage"]
        assert (found["weights"], found["gradients"]) == (expected[stage].weights, expected[stage].gradients)
        optimizer[stage] += found["optimizer"]
    ranks_per_stage = num_processes // resolved.parallel.pipeline_parallel_size
    for stage, memory in enumerate(expected):  # the shards of the distributed optimizer are not all of one size
        assert optimizer[stage] == memory.optimizer * ranks_per_stage


def a_recipe(training: dict | None = None, model: dict | None = None, **parallel: object) -> PretrainRecipe:
    shape = {"vocab_size": 1024, "num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 192, "num_query_groups": 2}
    steps = {"sequence_length": 128, "micro_batch_size": 2, "global_batch_size": 64}
    raw = {"model": shape | (model or {}), "training": steps | (training or {}), "parallel": parallel}
    return recipe_from_dict(PretrainRecipe, raw)


TOKENS = 2 * 128
RESIDUAL, ATTENTION, FFN = 4 * 64, 2 * (4 + 2) * 16, 3 * 192  # values per token
LOGITS = TOKENS * 1024 * (2 + 4)


@pytest.mark.parametrize(
    ("recipe", "num_bytes"),
    [
        (a_recipe(), 2 * TOKENS * 8 * (RESIDUAL + ATTENTION + FFN) + LOGITS),
        (
            a_recipe(tensor_parallel_size=2, sequence_parallel=True),
            2 * TOKENS * 8 * (RESIDUAL + ATTENTION + FFN) / 2 + LOGITS / 2,
        ),
        (a_recipe(tensor_parallel_size=2), 2 * TOKENS * 8 * (RESIDUAL + (ATTENTION + FFN) / 2) + LOGITS / 2),
        (a_recipe(context_parallel_size=2), TOKENS * 8 * (RESIDUAL + ATTENTION + FFN) + LOGITS / 2),
        (
            a_recipe({"recompute": "full"}),
            2 * TOKENS * (8 * RESIDUAL / 4 + RESIDUAL + ATTENTION + FFN) + LOGITS,
        ),
        (
            a_recipe({"recompute": "block", "recompute_layers": 3}),
            2 * TOKENS * (3 * RESIDUAL / 4 + 6 * (RESIDUAL + ATTENTION + FFN)) + LOGITS,
        ),
        (
            a_recipe({"recompute": "selective", "recompute_modules": ["mlp"]}),
            2 * TOKENS * (8 * (RESIDUAL + ATTENTION) + FFN) + LOGITS,
        ),
        (
            a_recipe(model={"transformer_impl": "local"}),
            2 * TOKENS * 8 * (RESIDUAL + ATTENTION + FFN + 2 * 4 * 128) + LOGITS,
        ),
        (a_recipe({"cpu_offload_layers": 5}), 2 * TOKENS * 3 * (RESIDUAL + ATTENTION + FFN) + LOGITS),
    ],
    ids=["whole", "sequence", "tensor", "context", "full", "block", "selective", "scores", "offload"],
)
def test_activations_follow_the_layout_and_what_is_recomputed(recipe: PretrainRecipe, num_bytes: float) -> None:
    assert stage_activations(recipe, 0, 32) == pytest.approx(num_bytes)


def test_a_pipeline_holds_the_micro_batches_of_its_schedule() -> None:
    plain = ParallelConfig(pipeline_parallel_size=4)
    assert [micro_batches_in_flight(plain, stage, 32) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(plain, 0, 2) == 2
    # Korthikanti et al., section 4.2.3: interleaving holds 1 + (p - 1) / (p v) times as much on the first stage.
    interleaved = ParallelConfig(pipeline_parallel_size=4, virtual_pipeline_parallel_size=2)
    assert micro_batches_in_flight(interleaved, 0, 32) == 4 * (1 + 3 / 8)
    assert micro_batches_in_flight(interleaved, 3, 32) == 2.5


def test_the_stages_hold_the_whole_model_once() -> None:
    recipe = a_recipe(pipeline_parallel_size=4, first_stage_layers=1, last_stage_layers=1)
    whole = sum(stage_parameters(recipe.model, recipe.parallel, stage) for stage in range(4))
    assert whole == recipe.model.num_parameters()


def test_the_bound_on_speed_is_the_peak_over_the_flops() -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"model": {"preset": "llama3-8b"}, "training": {"sequence_length": 8192}})
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    flops = 6 * weights + 6 * 32 * 8192 * 4096
    peak, name = peak_of(recipe, find_device("h100"))
    assert name == "dense bf16 of NVIDIA H100 80GB HBM3"
    assert tokens_per_s_bound(recipe, 8, peak) == pytest.approx(8 * 989.4e12 / flops)
    assert peak_of(recipe, find_device("cpu")) is None, "a CPU has no H100's peak"


def test_fsdp_splits_what_its_strategy_names() -> None:
    def of(**parallel: object) -> Memory:
        return estimate_memory(a_recipe(**parallel), data_parallel_size=4)[0]

    plain, grads, params = of(), of(fsdp="optim_grads"), of(fsdp="optim_grads_params")
    assert (grads.weights, grads.gradients, grads.optimizer) == (plain.weights, plain.gradients / 4, plain.optimizer)
    assert (params.weights, params.gradients) == (plain.weights / 4, plain.gradients / 4)
