"""Log-probabilities and entropies of logits that are split over the tensor-parallel group along the vocabulary.

All of them need the same two passes over the logits, so they are computed together. The backward pass only needs the
logits, which the model keeps anyway, and a few numbers per token; fp32 copies are made of some rows at a time.
"""

from typing import Any, NamedTuple

import torch

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)

from megatron.core import parallel_state

_ELEMENTS_AT_ONCE = 2**24  # of fp32: 64 MiB
_NO_PROBABILITY = -1e4
"""A logit whose exponential is 0 beside any other. Minus infinity times 0, in the entropy, would be no number."""


class TokenStatistics(NamedTuple):
    """Statistics of the distribution at every position, fp32 [...], in nats; the same on all tensor-parallel ranks."""

    log_probabilities: torch.Tensor
    """Log-probabilities of the given tokens."""
    entropies: torch.Tensor
    logsumexp: torch.Tensor
    """The logarithm of the softmax denominator; its square is a z-loss."""


def token_statistics(logits: torch.Tensor, tokens: torch.Tensor, vocab_size: int | None = None) -> TokenStatistics:
    """Takes this rank's logits [..., v / t], and token ids of the whole vocabulary [...], the same on all
    tensor-parallel ranks. All results are differentiable; the loss computed from them must be the same on these ranks.

    With `vocab_size`, the rows after it, which only pad the vocabulary, have no probability, as in an exported model.
    """
    size = logits.shape[-1]
    if vocab_size is not None and vocab_size < size * parallel_state.get_tensor_model_parallel_world_size():
        first = parallel_state.get_tensor_model_parallel_rank() * size
        is_padding = torch.arange(first, first + size, device=logits.device) >= vocab_size
        logits = logits.masked_fill(is_padding, _NO_PROBABILITY)
    results = _Statistics.apply(logits.reshape(-1, size), tokens.reshape(-1))
    return TokenStatistics(*(one.view(tokens.shape) for one in results))


def _place(tokens: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of tokens [n] among the `size` logits of this rank (0 for those on other ranks), and whether they are
    on this rank."""
    own = tokens - parallel_state.get_tensor_model_parallel_rank() * size
    is_here = (own >= 0) & (own < size)
    return own.where(is_here, 0), is_here


def _reduce(value: torch.Tensor, operation: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(value, operation, group=parallel_state.get_tensor_model_parallel_group())
    return value


def _parts(logits: torch.Tensor) -> list[slice]:
    num_rows, at_once = logits.shape[0], max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    return [slice(begin, begin + at_once) for begin in range(0, num_rows, at_once)]


class _Statistics(torch.autograd.Function):
    """With logits x, p = softmax(x) and lse = logsumexp(x): log-probability x_k - lse, entropy lse - sum(p x)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        place, is_here = _place(tokens, logits.shape[1])
        largest = _reduce(logits.amax(dim=1).float(), torch.distributed.ReduceOp.MAX)
        sums = torch.empty(3, len(tokens), device=logits.device)
        for part in _parts(logits):
            shifted = logits[part].float() - largest[part, None]
            exponentials = shifted.exp()
            sums[0, part] = shifted.gather(1, place[part, None])[:, 0].where(is_here[part], 0)
            sums[1, part] = exponentials.sum(dim=1)
            sums[2, part] = exponentials.mul_(shifted).sum(dim=1)
        of_token, total, weighted = _reduce(sums)
        log_total, mean = total.log(), weighted / total
        logsumexp = largest + log_total
        ctx.save_for_backward(logits, tokens, logsumexp, largest + mean)
        return of_token - log_total, log_total - mean, logsumexp

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """d log-probability / dx_i = [i = k] - p_i; d entropy / dx_i = -p_i (x_i - sum(p x)); d lse / dx_i = p_i."""
        logits, tokens, logsumexp, mean = ctx.saved_tensors
        of_token, of_entropy, of_logsumexp = (torch.zeros_like(mean) if one is None else one for one in gradients)
        place, is_here = _place(tokens, logits.shape[1])
        result = torch.empty_like(logits)
        for part in _parts(logits):
            x = logits[part].to(torch.float32, copy=True)
            factor = (of_logsumexp - of_token + of_entropy * mean)[part, None] - of_entropy[part, None] * x
            gradient = x.sub_(logsumexp[part, None]).exp_().mul_(factor)
            gradient.scatter_add_(1, place[part, None], (of_token * is_here)[part, None])
            result[part] = gradient
        return result, None
