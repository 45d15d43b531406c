"""Log-probabilities, entropies and logsumexp of split logits: values and gradients are those of plain torch."""

import pytest
import torch
from ranks import on_tensor_parallel_ranks

from megatron_tpt.objectives import vocab_parallel
from megatron_tpt.objectives.vocab_parallel import TokenStatistics, token_statistics

SHAPE, VOCAB_SIZE = (3, 5), 48


def plain_statistics(logits: torch.Tensor, tokens: torch.Tensor) -> TokenStatistics:
    log_probabilities = logits.log_softmax(dim=-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    of_tokens = log_probabilities.gather(-1, tokens[..., None])[..., 0]
    return TokenStatistics(of_tokens, entropies, logits.logsumexp(dim=-1))


def compare(rank: int, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # Each result separately, and all at once with one weight each.
        for names in (*((name,) for name in TokenStatistics._fields), TokenStatistics._fields):
            compare_results(names, dtype, rank, size)


def compare_results(names: tuple[str, ...], dtype: torch.dtype, rank: int, size: int) -> None:
    random = torch.Generator().manual_seed(0)
    whole = (10 * torch.randn(*SHAPE, VOCAB_SIZE, generator=random) + 100).to(dtype)
    tokens = torch.randint(VOCAB_SIZE, SHAPE, generator=random)
    weights = torch.randn(len(names), *SHAPE, generator=random)
    part = whole.chunk(size, dim=-1)[rank]
    expected, ours = whole.float().clone().requires_grad_(), part.clone().requires_grad_()
    values = []
    for logits, statistics in ((expected, plain_statistics), (ours, token_statistics)):
        results = statistics(logits, tokens)
        values.append(torch.stack([getattr(results, name) for name in names]))
        (values[-1] * weights).sum().backward()
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)
    assert ours.grad.dtype == dtype and torch.equal(ours.detach(), part), "the logits are changed"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    gradient = expected.grad.chunk(size, dim=-1)[rank]
    torch.testing.assert_close(ours.grad.float(), gradient, rtol=tolerance, atol=1e-5)


def compare_padded(rank: int, size: int) -> None:
    """20 tokens: of two ranks, the second has padding alone."""
    whole = 10 * torch.randn(*SHAPE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    whole[..., 20:] = 30.0
    tokens = torch.randint(20, SHAPE, generator=torch.Generator().manual_seed(1))
    expected = whole[..., :20].clone().requires_grad_()
    ours = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    results = plain_statistics(expected, tokens), token_statistics(ours, tokens, vocab_size=20)
    for one in results:
        sum(value.sum() for value in one).backward()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    gradient = torch.nn.functional.pad(expected.grad, (0, VOCAB_SIZE - 20)).chunk(size, dim=-1)[rank]
    torch.testing.assert_close(ours.grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_pad_the_vocabulary_have_no_probability(size: int) -> None:
    on_tensor_parallel_ranks(size, compare_padded)


@pytest.mark.parametrize("size", [1, 2])
def test_values_and_gradients_are_those_of_plain_torch(size: int) -> None:
    on_tensor_parallel_ranks(size, compare)


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_parallel, "_ELEMENTS_AT_ONCE", 4 * VOCAB_SIZE)  # the last part is a smaller one
    on_tensor_parallel_ranks(1, compare)
