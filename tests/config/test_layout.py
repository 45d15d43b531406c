"""Layouts: what does not fit is refused with what to change, what fits is shared out as it says."""

import pytest
import torch

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.steps import part_of_sequence

MODEL = {"vocab_size": 1000, "num_layers": 8, "num_query_groups": 4}
TRAINING = {"global_batch_size": 16, "sequence_length": 32}


def checked(world_size: int, cls: type = PretrainRecipe, **parallel: object) -> PretrainRecipe:
    raw = {"model": MODEL, "training": TRAINING, "data": {"train": "prefix"}}
    recipe = recipe_from_dict(cls, {**raw, "parallel": parallel})
    recipe.check(world_size)
    return recipe


@pytest.mark.parametrize(
    ("parallel", "world_size", "words"),
    [
        ({"tensor_parallel_size": 3}, 3, "model.num_attention_heads=4 is not a multiple of parallel.tensor_parallel"),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2}, 2, "start a multiple of 4"),
        ({"virtual_pipeline_parallel_size": 2}, 1, "needs parallel.pipeline_parallel_size > 1"),
        ({"first_stage_layers": 2}, 1, "needs parallel.pipeline_parallel_size > 1"),
        ({"pipeline_parallel_size": 3}, 3, "8 layers are left for 3 equal stages"),
        ({"pipeline_parallel_size": 4, "first_stage_layers": 1}, 4, "7 layers are left for 3 equal stages"),
        ({"pipeline_parallel_size": 2, "first_stage_layers": 8}, 2, "0 layers are left for 1 equal stages"),
        ({"pipeline_parallel_size": 2, "first_stage_layers": 3, "last_stage_layers": 4}, 2, "1 layers are left for 0"),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 3}, 2, "layers of a pipeline stage=4"),
        ({"pipeline_parallel_size": 4, "virtual_pipeline_parallel_size": 2}, 32, "micro-batches per step and rank=2"),
        ({"pipeline_parallel_size": 0}, 1, "parallel.pipeline_parallel_size=0 must be 1 or more"),
        ({"context_parallel_size": 3}, 3, "training.sequence_length=32 is not a multiple of twice"),
        ({"context_parallel_size": 8, "context_parallel_exchange": "a2a"}, 8, "model.num_query_groups=4 is not a mul"),
        ({"rank_order": "dp-tp"}, 1, "rank_order"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(parallel: dict, world_size: int, words: str) -> None:
    with pytest.raises(UserError) as error:
        checked(world_size, **parallel)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_ramp_of_batch_sizes_must_fit_too() -> None:
    raw = {"training": {**TRAINING, "batch_size_ramp": [{"num_steps": 5, "global_batch_size": 6}]}}
    with pytest.raises(UserError, match="global_batch_size=6 is not a multiple of"):
        recipe_from_dict(PretrainRecipe, {**raw, "model": MODEL, "data": {"train": "prefix"}}).check(4)


def test_the_warm_up_ends_before_the_decay() -> None:
    raw = {"model": MODEL, "training": TRAINING, "data": {"train": "prefix"}, "optimizer": {"warmup_steps": 100}}
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps=100 must be below"):
        recipe_from_dict(PretrainRecipe, raw).check(1)


def test_packed_examples_are_not_split_over_processes() -> None:
    with pytest.raises(UserError, match="cannot split packed examples"):
        checked(2, FinetuneRecipe, context_parallel_size=2)


def test_layers_are_shared_as_the_layout_says() -> None:
    assert ParallelConfig().stage_layers(7) == [7]
    assert ParallelConfig(pipeline_parallel_size=4).stage_layers(8) == [2, 2, 2, 2]
    assert ParallelConfig(pipeline_parallel_size=4, first_stage_layers=3, last_stage_layers=1).stage_layers(8) == [
        3, 2, 2, 1
    ]  # fmt: skip
    assert ParallelConfig(pipeline_parallel_size=2, first_stage_layers=3, last_stage_layers=5).stage_layers(8) == [3, 5]


def test_context_parallel_ranks_share_a_sequence_with_equal_work() -> None:
    batch = {"tokens": torch.arange(16).view(1, 16), "source": torch.tensor([7])}
    parts = [part_of_sequence(batch, rank, 2) for rank in range(2)]
    assert [part["tokens"].tolist() for part in parts] == [
        [[0, 1, 2, 3, 12, 13, 14, 15]],
        [[4, 5, 6, 7, 8, 9, 10, 11]],
    ]
    assert all(part["source"].tolist() == [7] for part in parts)
    pairs = [sum(position + 1 for position in part["tokens"][0].tolist()) for part in parts]  # causal attention
    assert pairs[0] == pairs[1]
    assert part_of_sequence(batch, 0, 1) is batch
