"""The list of a model's tensors is that of what is built, and what follows from it follows its depth."""

import dataclasses

import pytest

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.training.checkpoint_state import weights_state

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

ALL = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True}
OLMO = {"norm_placement": "after", "qk_norm": True, "qk_norm_width": "all-heads", "num_query_groups": 2}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (GPTConfig, {}),
        (GPTConfig, ALL),
        (GPTConfig, {"tie_embeddings": True, "head_dim": 32, "num_query_groups": 2}),
        (GPTConfig, OLMO),
        (RecurrentConfig, {}),
    ],
)
def test_the_tensors_are_those_of_checkpoints(family: type[GPTConfig], fields: dict) -> None:
    model = family(vocab_size=300, num_layers=3, **fields)
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(0)
        state = weights_state(build_chunks(model, ParallelConfig(), TrainingConfig(dtype="float32"), seed=None))
    found = {}
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensorFactory):  # a gated projection, whose halves are stored one above the other
            found[tensor.key] = (model.num_layers, *tensor.data.shape)
        else:
            found[tensor.key] = tensor.global_shape
    layers = {"layer": (model.num_layers,), "embedding": (), "block": (), "output": ()}
    own = [weight for weight in model.weights() if not weight.is_tied]
    assert {weight.key: (*layers[weight.part], *weight.shape) for weight in own} == found


def test_operations_follow_the_layers_that_are_passed() -> None:
    model = GPTConfig(vocab_size=300, num_layers=2)
    deeper = dataclasses.replace(model, num_layers=6)
    assert model_flops_per_token(model, 128, {"layer": 6, "block": 0}) == model_flops_per_token(deeper, 128)
