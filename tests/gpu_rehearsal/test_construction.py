"""The model of every recipe in examples/, built under Transformer Engine's layers with each FP8 recipe's settings."""

import dataclasses
from collections.abc import Iterator

import hopper
import pytest
import recipes
import torch

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.models.hugging_face import Row
from megatron_tpt.models.precision import describe_kernels, require_active
from megatron_tpt.models.sizes import stage_parameters
from megatron_tpt.models.spec import build_chunks, spec_of
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.training.checkpoint_state import weights_state
from megatron_tpt.training.reporting import ReportMetrics

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

PRECISIONS = {
    "bf16": {"fp8": "none"},
    "delayed": {"fp8": "delayed"},
    "tensorwise": {"fp8": "tensorwise", "bf16_layers_at_start": 1},
    "blockwise": {"fp8": "blockwise", "fp8_format": "e4m3"},
}  # training.fp8_param_gather is not among them: parameters are made in FP8 by a kernel


def with_precision(recipe: Recipe, name: str) -> Recipe:
    return dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, dtype="bfloat16", **PRECISIONS[name])
    )


def placed(chunks: list[GPTModel]) -> dict[str, set[tuple]]:
    """By key of a checkpoint, where the parts that this rank holds lie in the whole, and their precision."""
    state = weights_state(chunks)
    apply_factories(state)
    found: dict[str, set[tuple]] = {}
    for part in nested_values(state):
        assert isinstance(part, ShardedTensor)
        place = (part.global_shape, part.global_offset, part.local_shape, part.axis_fragmentations, part.dtype)
        found.setdefault(part.key, set()).add((*place, part.replica_id))
    return found


def kernels_of(gpt: GPTModel) -> set[str]:
    """The packages that the layers' products, attention and norms are from."""
    names = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "core_attention", "final_layernorm")
    parts = {part for name, part in gpt.named_modules() if name.rsplit(".", 1)[-1] in names}
    return {base.__module__.split(".")[0] for part in parts for base in type(part).__mro__} & {"transformer_engine"}


def outer_ranks(parallel: ParallelConfig, replicas: int = 2) -> Iterator[tuple[int, int]]:
    """The first and the last rank of a run."""
    num_ranks = replicas * parallel.model_parallel_size
    yield from ((0, num_ranks), (num_ranks - 1, num_ranks))


def refusal(recipe: Recipe) -> str | None:
    """What is said of a precision that a recipe cannot have: models for two CPU cores are narrower than a block,
    recurrent ones have no FP8, and neither has reinforcement learning."""
    widths = (recipe.model.hidden_size, recipe.model.ffn_hidden_size // recipe.parallel.tensor_parallel_size)
    if recipe.training.fp8 != "none" and recipe.model.family == "recurrent":
        return "is not supported with model.family=recurrent"
    if recipe.training.fp8 == "blockwise" and any(width % 128 for width in widths):
        return r"is not a multiple of training\.fp8=blockwise: its block=128"
    if recipe.training.fp8 != "none" and isinstance(recipe, RLRecipe):
        return "is not supported by reinforcement learning"
    return None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_has_the_same_tensors_under_transformer_engine(name: str, precision: str) -> None:
    recipe = with_precision(recipes.load(name), precision)
    # The smallest recipes have one micro-batch in a step, so that two replicas would share none.
    replicas = 2 if recipe.training.global_batch_size > recipe.training.micro_batch_size else 1
    world_size = replicas * recipe.parallel.model_parallel_size
    if (words := refusal(recipe)) is not None:
        with pytest.raises(UserError, match=words):
            recipe.check(world_size)
        return
    recipe.check(world_size)
    local = dataclasses.replace(recipe.model, transformer_impl="local")
    without_fp8 = dataclasses.replace(recipe.training, fp8="none", fp8_format="hybrid", bf16_layers_at_start=0)
    for rank, num_ranks in outer_ranks(recipe.parallel, replicas):
        with hopper.h100("meta"), hopper.rank_of(recipe.parallel, rank, num_ranks):
            gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=None)
            config = gpts[0].config
            assert kernels_of(gpts[0]) == {"transformer_engine"} and config.transformer_impl == "transformer_engine"
            parameters = sum(parameter.numel() for gpt in gpts for parameter in gpt.parameters())
            stage = 0 if rank == 0 else recipe.parallel.pipeline_parallel_size - 1
            assert parameters == stage_parameters(recipe.model, recipe.parallel, stage)
            expected = placed(build_chunks(local, recipe.parallel, without_fp8, seed=None))
            assert placed(gpts) == expected
            if recipe.training.fp8 != "none":
                assert (config.fp8, config.fp8_recipe) == (recipe.training.fp8_format, recipe.training.fp8)
            assert hopper.NAME in describe_kernels(config)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipes_tensors_become_hugging_faces_and_return(name: str) -> None:
    recipe = recipes.load(name)
    adapter = spec_of(recipe.model).hugging_face()
    assert adapter is not None
    with hopper.h100("meta"), hopper.rank_of(ParallelConfig(), 0, 1):
        state = weights_state(build_chunks(recipe.model, ParallelConfig(), recipe.training, seed=None))
        tensors = {part.key: part for part in nested_values(state)}
        for row in adapter.rows(recipe.model):
            whole = tensors.pop(row.weight.key)
            shape = whole.data.shape if not isinstance(whole, ShardedTensor) else whole.local_shape
            assert tuple(shape) == row.weight.shape
            assert there_and_back(row) == row.weight.shape
    assert not tensors, "tensors that no row of the table speaks of"


def there_and_back(row: Row) -> tuple[int, ...]:
    parts = row.transform.split(torch.empty(row.weight.shape, device="meta"))
    assert len(parts) == len(row.names)
    return tuple(row.transform.join(parts).shape)


def test_a_hopper_has_every_fp8_recipe_but_that_of_its_successor() -> None:
    training = recipes.load("tpt/pretrain_8b").training
    with hopper.h100():
        for name in ("delayed", "tensorwise", "blockwise"):
            require_active(dataclasses.replace(training, fp8=name), transformer_engine=True)
        with pytest.raises(UserError, match=f"mxfp8 is not active on {hopper.NAME}: .*; give another"):
            require_active(dataclasses.replace(training, fp8="mxfp8"), transformer_engine=True)


@pytest.mark.parametrize(("fp8", "peak"), [("none", 989), ("delayed", 1979)])
def test_utilization_is_of_the_h100s_dense_peak(fp8: str, peak: float) -> None:
    recipe = recipes.load("tpt/pretrain_8b")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, fp8=fp8))
    report = ReportMetrics()
    report.flops_per_token = 1.0
    with hopper.h100(), hopper.rank_of(ParallelConfig(), 0, 1):
        assert report._peak_tflops(recipe) == pytest.approx(peak, abs=1)


LAYOUTS = {
    "context": {"context_parallel_size": 2, "context_parallel_exchange": "all_gather"},
    "pipeline": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2, "tensor_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_no_recipe_in_examples_has_are_built_too(layout: str) -> None:
    recipe = recipes.load("tpt/pretrain_8b")
    parallel = ParallelConfig(**LAYOUTS[layout])
    for rank, num_ranks in outer_ranks(parallel):
        with hopper.h100("meta"), hopper.rank_of(parallel, rank, num_ranks):
            gpts = build_chunks(recipe.model, parallel, recipe.training, seed=None)
            assert len(gpts) == parallel.virtual_pipeline_parallel_size
            attention = gpts[0].decoder.layers[0].self_attention.core_attention
            assert attention.cp_comm_type == (parallel.context_parallel_exchange if layout == "context" else "p2p")


@pytest.mark.parametrize("recompute", [{"cpu_offload_layers": 2}, {"recompute": "selective"}, {"recompute": "full"}])
def test_what_is_offloaded_or_recomputed_is_built(recompute: dict) -> None:
    recipe = recipes.load("tpt/mid_3b")
    training = dataclasses.replace(recipe.training, **recompute)
    with hopper.h100("meta"), hopper.rank_of(ParallelConfig(), 0, 1):
        (gpt,) = build_chunks(recipe.model, ParallelConfig(), training, seed=None)
    assert gpt.config.cpu_offloading == bool(training.cpu_offload_layers)
    assert (gpt.decoder.offload_context is not None) and gpt.config.recompute_granularity == {
        "none": None, "selective": "selective", "full": "full"
    }[training.recompute]  # fmt: skip
