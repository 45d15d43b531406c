"""Kernels that have a reference in plain torch: value and gradients of one held against those of the other.

The reference computes in fp32 from the same inputs, rounded to the precision of the kernel. What is under test is what
a model of this machine runs through: Transformer Engine's and fused kernels on a GPU, Megatron Core's own on a CPU.
Needs process groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tpt.models.gpt.build import transformer_config
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.recipes.pretrain import PretrainRecipe

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import attention_mask_func

Function = Callable[..., Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative errors that rounding explains: bf16 keeps 8 bits, and a kernel rounds a few times on its way."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, its reference, and inputs in fp32 by the names of their arguments."""

    under_test: Function
    reference: Function
    inputs: Mapping[str, Tensor]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny))


def _run(function: Function, inputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    value = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    value.backward(torch.randn(value.shape, generator=generator).to(value))
    return {"output": value.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def compare(kernel: Kernel, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Relative errors of the output, and of the gradient with respect to every input, by its name."""
    rounded = {name: value.to(dtype) for name, value in kernel.inputs.items()}
    found = _run(kernel.under_test, rounded, seed)
    expected = _run(kernel.reference, {name: value.float() for name, value in rounded.items()}, seed)
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in expected}


def too_far(errors: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    """What is further from its reference than rounding explains; what is not a number is."""
    return [name for name, error in errors.items() if not error <= TOLERANCE[dtype]]


def _rotated(t: Tensor, angles: Tensor) -> Tensor:
    """[s, b, heads, d] turned by [s, d / 2] angles: the two halves of a head are the coordinates."""
    cos, sin = (torch.cat([part, part], dim=-1)[:, None, None] for part in (angles.cos(), angles.sin()))
    first, second = t.chunk(2, dim=-1)
    return t * cos + torch.cat([-second, first], dim=-1) * sin


def _causal(scores: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf"))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [s, b, heads, d] queries and [s, b, groups, d] keys and values: [s, b, heads d]."""
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    weights = _causal(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def _core_attention(config: TransformerConfig) -> Function:
    kind = DotProductAttention
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        kind = TEDotProductAttention
    attention = kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[0]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).triu(1)
        output: Tensor = attention(query, key, value, mask, attn_mask_type=AttnMaskType.causal)
        return output

    return run


def _rotary_kernels(config: TransformerConfig, rows: Tensor, packed: Tensor) -> dict[str, Kernel]:
    """Of heads in rows, [s, b, heads, d], and of two examples that share a row, [s, heads, d]."""
    length, d, device = rows.shape[0], rows.shape[-1], rows.device
    angles = torch.outer(torch.arange(length), 10_000.0 ** -torch.linspace(0, 1, d // 2 + 1)[:-1]).to(device)
    frequencies = torch.cat([angles, angles], dim=-1)[:, None, None]
    context = parallel_state.get_context_parallel_group()
    begin, longest = length // 3, length - length // 3  # Megatron Core takes angles of all positions for one example's
    starts = torch.tensor([0, begin, length], dtype=torch.int32, device=device)

    def rotated_apart(t: Tensor) -> Tensor:
        return _rotated(t[:, None], torch.cat([angles[:begin], angles[:longest]]))[:, 0]

    return {
        "rope": Kernel(
            lambda t: apply_rotary_pos_emb(t, frequencies, config, cp_group=context),
            lambda t: _rotated(t, angles),
            {"t": rows},
        ),
        "rope of packed examples": Kernel(
            lambda t: apply_rotary_pos_emb(t, frequencies[:longest], config, cu_seqlens=starts, cp_group=context),
            rotated_apart,
            {"t": packed},
        ),
    }


def all_kernels(recipe: PretrainRecipe, device: torch.device, length: int) -> dict[str, Kernel]:
    """The kernels that a model of `recipe` runs through, with inputs of its sizes and `length` positions."""
    model, batch = recipe.model, 2
    assert isinstance(model, GPTConfig)
    config = transformer_config(model, recipe.parallel, recipe.training)
    heads, groups, d = model.num_attention_heads, model.query_groups, model.kv_channels
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    labels = torch.randint(model.padded_vocab_size, (length, batch), generator=generator).to(device)
    softmax = FusedScaleMaskSoftmax(
        False, config.bf16, AttnMaskType.causal, config.masked_softmax_fusion, attention_mask_func, True, None
    )
    # The fused kernel is for bf16 alone: it rounds its gradients.
    cross_entropy = fused_vocab_parallel_cross_entropy if config.bf16 else vocab_parallel_cross_entropy
    return {
        **_rotary_kernels(config, draw(length, batch, heads, d), draw(length, heads, d)),
        "swiglu": Kernel(
            lambda t: bias_swiglu_impl(t, None),
            lambda t: F.silu(t.chunk(2, dim=-1)[0]) * t.chunk(2, dim=-1)[1],
            {"t": draw(length, batch, 2 * model.ffn_hidden_size)},
        ),
        "cross entropy": Kernel(
            lambda logits: cross_entropy(logits, labels, tp_group=parallel_state.get_tensor_model_parallel_group()),
            lambda logits: F.cross_entropy(logits.permute(0, 2, 1), labels, reduction="none"),
            {"logits": draw(length, batch, model.padded_vocab_size)},
        ),
        "masked softmax": Kernel(
            lambda scores: softmax(scores.clone(), None),  # it masks in place, in fp32 the input itself
            lambda scores: _causal(scores).softmax(dim=-1),
            {"scores": draw(batch, heads, length, length)},
        ),
        "attention": Kernel(
            _core_attention(config),
            _attention,
            {
                "query": draw(length, batch, heads, d),
                "key": draw(length, batch, groups, d),
                "value": draw(length, batch, groups, d),
            },
        ),
    }
