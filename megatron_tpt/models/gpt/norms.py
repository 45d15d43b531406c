"""The norms of GPTs, as Megatron Core builds them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)

from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron Core builds norms, with sequence parallelism.

    Megatron Core's own wrapper of it refuses sequence parallelism. Only an attribute of the weight is needed: under
    sequence parallelism each rank processes a part of the positions, and `finalize_model_grads` sums the gradients of
    weights with this attribute over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class NormOfAllHeads(torch.nn.Module):
    """RMSNorm over the queries or keys of all heads of a token together (OLMo-2): [..., local heads, d].

    Every tensor-parallel rank has the whole weight and uses the part of its heads: `finalize_model_grads` sums the
    gradients of query and key norms over the ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_heads * hidden_size, dtype=config.params_dtype))
        self.num_heads, self.eps = num_heads, eps

    def forward(self, heads: Tensor) -> Tensor:
        values = heads.float()
        squares = values.square().sum(dim=(-2, -1), keepdim=True)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:  # the sum over all ranks, in both directions
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        num_local, width = heads.shape[-2:]
        first = parallel_state.get_tensor_model_parallel_rank() * num_local
        weight = self.weight.view(self.num_heads, width)[first : first + num_local]
        return (weight * (values * torch.rsqrt(squares / len(self.weight) + self.eps))).to(heads.dtype)


class NormedResidual(torch.nn.Module):
    """residual + dropout(RMSNorm(branch)), in place of Megatron Core's bias-dropout-add (OLMo-2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that a layer calls, as get_bias_dropout_add gives it; there is no fused one."""

        def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            values, bias = branch
            # A layer enables gradients here even under no_grad, where the weight alone would begin a graph.
            with torch.set_grad_enabled(values.requires_grad):
                normed = self.norm(values if bias is None else values + bias)
                return residual + torch.nn.functional.dropout(normed, dropout, training)

        return add


def over_all_heads(num_heads: int) -> Callable[..., Any]:
    """NormOfAllHeads as a layer specification has it."""

    def build(hidden_size: int, config: TransformerConfig, eps: float) -> NormOfAllHeads:
        return NormOfAllHeads(config, hidden_size, eps, num_heads=num_heads)

    return build
