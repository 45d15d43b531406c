"""The estimate of `--dry-run` against the formula of Megatron-LM's --log-memory-to-tensorboard, at published layouts.

The formula (megatron/training/theoretical_memory_usage.py, for sequence parallelism and attention that keeps no scores)
is that of Korthikanti et al., arXiv 2205.05198, table 2, with the feed-forward network counted from its own width. It
knows neither context parallelism, so that a rank's share of the sequence stands in it, nor the smaller keys and values
of grouped queries, whose activations it counts as full.
"""

from dataclasses import dataclass

import pytest

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.memory import Memory, estimate_memory

VOCABULARY = 128_256
SHAPES = {
    "8b": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "70b": {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
}


@dataclass(frozen=True)
class Layout:
    """A published way to train Llama 3: sizes of the parallel dimensions, the devices, and samples of a step."""

    shape: str
    t: int
    p: int
    c: int
    devices: int
    samples: int
    pieces: int = 1
    length: int = 8192

    @property
    def data(self) -> int:
        return self.devices // (self.t * self.p * self.c)


LAYOUTS = {
    # Megatron-LM, examples/llama/train_llama3_8b_h100_fp8.sh
    "megatron-lm-8b": Layout("8b", t=1, p=1, c=1, devices=8, samples=128),
    # NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/recipes/llama: llama3_8b.py, llama3_70b.py, llama3_70b_16k.py
    "bridge-8b": Layout("8b", t=1, p=1, c=2, devices=8, samples=512),
    "bridge-8b-16k": Layout("8b", t=4, p=2, c=2, devices=16, samples=512, length=16384),
    "bridge-70b": Layout("70b", t=4, p=4, c=2, devices=64, samples=512, pieces=5),
    "bridge-70b-16k": Layout("70b", t=8, p=2, c=2, devices=64, samples=512, length=16384),
}


def formula(layout: Layout) -> tuple[float, float]:
    """Bytes of weights, gradients and the split optimizer's state, and of activations, on the first pipeline stage."""
    shape = SHAPES[layout.shape]
    h, f, num_layers = shape["hidden_size"], shape["ffn_hidden_size"], shape["num_layers"]
    layer = 2 * h * h * (1 + 8 / shape["num_attention_heads"]) + 3 * h * f + 2 * h
    embeddings = (2 if layout.p == 1 else 1) * VOCABULARY * h
    parameters = (layer * num_layers / layout.p + h / layout.p + embeddings) / layout.t
    state = parameters * (6 + 12 / (layout.data * layout.c))

    tokens = layout.length / layout.c
    activations = tokens * h * (18 + 4 * f / h) * num_layers + tokens * (8 + h) * layout.p
    if layout.pieces > 1:
        activations *= 1 + (layout.p - 1) / (layout.p * layout.pieces)
    if layout.p == 1:
        activations += 4 * tokens * (h + VOCABULARY)
    return state, activations / layout.t


def estimate(layout: Layout) -> Memory:
    """What `--dry-run` says of the same."""
    raw = {
        "model": SHAPES[layout.shape] | {"num_query_groups": 8, "vocab_size": VOCABULARY},
        "training": {"sequence_length": layout.length, "global_batch_size": layout.samples},
        "parallel": {
            "tensor_parallel_size": layout.t,
            "sequence_parallel": layout.t > 1,
            "pipeline_parallel_size": layout.p,
            "virtual_pipeline_parallel_size": layout.pieces,
            "context_parallel_size": layout.c,
        },
    }
    return estimate_memory(recipe_from_dict(PretrainRecipe, raw), layout.data)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_estimate_is_within_a_tenth_of_megatrons_formula(name: str) -> None:
    ours, (state, activations) = estimate(LAYOUTS[name]), formula(LAYOUTS[name])
    assert ours.weights + ours.gradients + ours.optimizer == pytest.approx(state, rel=0.001)
    assert ours.total == pytest.approx(state + activations, rel=0.1)
