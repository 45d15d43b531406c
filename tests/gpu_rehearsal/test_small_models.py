"""Small models under Transformer Engine, in memory: weights, checkpoints, gradient buffers and the optimizer."""

import dataclasses
from pathlib import Path

import hopper
import pytest
import recipes
import torch

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.precision import scaling_statistics
from megatron_tpt.models.spec import build_chunks, spec_of
from megatron_tpt.training import checkpoint_loading
from megatron_tpt.training.checkpoint_saving import save_checkpoint
from megatron_tpt.training.checkpoint_state import fp8_statistics, optimizer_format, set_fp8_statistics, weights_state
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, current_learning_rate, wrap_model

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.optimizer.optimizer import MegatronOptimizer

# One of every kind of model in examples/.
KINDS = {"llama": "tpt/pretrain_8b", "llama-scaled-tied": "tpt/mid_3b", "qwen2": "tpt/mid_1.5b", "own": "gpu_125m"}
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def small_recipe(name: str, *, implementation: str = "auto", **training: object) -> Recipe:
    recipe = recipes.load(name)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipes.small(recipe.model), transformer_impl=implementation),
        training=dataclasses.replace(recipe.training, **training),
        parallel=dataclasses.replace(recipe.parallel, tensor_parallel_size=1, sequence_parallel=False),
    )


def build(recipe: Recipe, seed: int | None = 3) -> list:
    return build_chunks(recipe.model, recipe.parallel, recipe.training, seed=seed)


def values(chunks: list) -> dict[tuple, torch.Tensor]:
    state = weights_state(chunks)
    apply_factories(state)
    return {(part.key, part.global_offset): part.data for part in nested_values(state)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_draws_the_same_weights_for_both_kernels(kind: str) -> None:
    with hopper.h100(), hopper.rank_of(ParallelConfig(), 0, 1):
        ours, theirs = (values(build(small_recipe(KINDS[kind], implementation=name))) for name in ("auto", "local"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_become_hugging_faces_and_return_bit_for_bit(kind: str) -> None:
    with hopper.h100(), hopper.rank_of(ParallelConfig(), 0, 1):
        recipe = small_recipe(KINDS[kind])
        (gpt,) = build(recipe)
        adapter = spec_of(recipe.model).hugging_face()
        assert adapter is not None
        tensors = dict(weights_state(gpt)["piece_0"])
        by_key = {part.key: part for part in tensors.values()}
        for row in adapter.rows(recipe.model):
            part = by_key[row.weight.key]
            value = part.data
            assert torch.equal(row.transform.join(row.transform.split(value)), value)


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("fp8", ["none", "blockwise"])
def test_a_model_gets_gradient_buffers_and_its_optimizer(fp8: str, num_ranks: int) -> None:
    states = []
    for implementation in ("auto", "local"):
        recipe = small_recipe(
            "tpt/mid_1.5b", implementation=implementation, fp8=fp8 if implementation == "auto" else "none"
        )
        with hopper.h100(), hopper.rank_of(ParallelConfig(), num_ranks - 1, num_ranks):
            chunks = wrap_model(build(recipe), recipe)
            optimizer = build_optimizer(chunks, recipe)
            schedule = build_schedule(optimizer, recipe)
            schedule.step(1)
            assert current_learning_rate(optimizer) == pytest.approx(recipe.optimizer.learning_rate / 100)
            inner = type(optimizer.chained_optimizers[0].optimizer)
            assert inner.__module__.split(".")[0] == "transformer_engine", "Megatron Core takes its fused Adam"
            gradients = [parameter.main_grad for parameter in chunks[0].parameters()]
            assert {gradient.dtype for gradient in gradients} == {torch.float32}
            weights = weights_state(chunks[0].module)
            state = optimizer.sharded_state_dict(weights, is_loading=True, metadata=optimizer_format("dp_reshardable"))
            states.append(
                {part.key.rsplit(".", 1)[-1] for part in nested_values(state) if isinstance(part, ShardedTensor)}
            )
    assert states[0] == states[1] == {"param", "exp_avg", "exp_avg_sq"}


def give_statistics(gpt: torch.nn.Module) -> list[torch.nn.Module]:
    """Give every linear layer the scales of delayed scaling that steps would have left. Returns these layers."""
    scaled = [module for name, module in gpt.named_modules() if name.rsplit(".", 1)[-1] in LINEAR]
    for module in scaled:
        module.fp8_meta["num_gemms"] = 1
        module.init_fp8_meta_tensors(get_fp8_recipe(gpt.config))
        for direction in ("scaling_fwd", "scaling_bwd"):
            module.fp8_meta[direction].scale.uniform_(1, 2)
            module.fp8_meta[direction].amax_history.uniform_()
    return scaled


def statistics_of(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value.clone()
        for name, module in gpt.named_modules()
        for key, value in scaling_statistics(module).items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_delayed_scaling_keeps_is_saved_as_data_and_comes_back(tmp_path: Path) -> None:
    recipe = small_recipe("tpt/mid_3b", fp8="delayed", fp8_amax_history=16)
    with hopper.h100(), hopper.rank_of(ParallelConfig(), 0, 1):
        (gpt,), (other,) = build(recipe), build(recipe, seed=4)
        scaled = give_statistics(gpt)
        saved = fp8_statistics(gpt)
        path = tmp_path / "statistics.pt"
        torch.save({name: {key: part.data for key, part in piece.items()} for name, piece in saved.items()}, path)
        set_fp8_statistics(other, torch.load(path, weights_only=True))
        assert len(statistics_of(gpt)) == 4 * len(scaled) == 16 * recipe.model.num_layers
        assert_equal(statistics_of(other), statistics_of(gpt))


@pytest.mark.parametrize("change", ["none", "layout", "version"])
def test_a_checkpoints_scales_come_back_or_a_line_says_that_they_do_not(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small_recipe("tpt/mid_3b", fp8="delayed", fp8_amax_history=16)
    folder = tmp_path / "step_00000001"

    def make() -> tuple[torch.nn.Module, MegatronOptimizer]:
        (gpt,) = build(recipe)
        optimizer = build_optimizer(wrap_model([gpt], recipe), recipe)
        form = optimizer_format(recipe.checkpoint.optimizer_sharding)
        optimizer.sharded_state_dict(weights_state(gpt), is_loading=True, metadata=form)  # makes the moments
        return gpt, optimizer

    with hopper.h100(), hopper.rank_of(ParallelConfig(), 0, 1):
        gpt, optimizer = make()
        give_statistics(gpt)
        save_checkpoint(folder, gpt, optimizer, {}, recipe_yaml="", tokenizer_path=None)
        saved, (other, its_optimizer) = statistics_of(gpt), make()
        if change == "layout":
            monkeypatch.setattr(checkpoint_loading, "layout", lambda: ["cuda", 2, 1, 1])
        if change == "version":
            read = checkpoint_loading.read_trainer_state
            old = {"has_fp8_scales": "has_fp8_statistics"}
            monkeypatch.setattr(
                checkpoint_loading,
                "read_trainer_state",
                lambda folder: {old.get(name, name): value for name, value in read(folder).items()},
            )
        checkpoint_loading.load_checkpoint(folder, other, its_optimizer)
    assert_equal(statistics_of(other), saved if change == "none" else {})
    assert ("delayed scaling begins anew" in caplog.text) == (change != "none")
