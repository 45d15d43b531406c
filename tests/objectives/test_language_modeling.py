"""Losses by kind of token and by source, from token losses and from logits alike."""

import pytest
import torch
from ranks import on_tensor_parallel_ranks

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.objectives.language_modeling import LanguageModeling


def test_sums_are_by_kind_and_by_source() -> None:
    objective = LanguageModeling(["a", "b", "c"])
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    batch = {
        "labels": torch.zeros(2, 4, dtype=torch.long),
        "loss_mask": torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]),
        "is_thinking": torch.tensor([[True, False, True, True], [False, False, True, True]]),
    }
    loss, sums = objective(losses, {**batch, "source": torch.tensor([2, 0])})
    assert tuple(sums) == objective.sum_names and objective.sum_names[:2] == ("loss", "tokens")
    assert float(loss) == 27.0
    assert {name: float(value) for name, value in sums.items() if value} == {
        **{"loss": 27.0, "tokens": 6.0, "thinking_loss": 14.0, "thinking_tokens": 3.0},
        **{"source_loss/a": 18.0, "source_tokens/a": 3.0, "source_loss/c": 9.0, "source_tokens/c": 3.0},
    }
    expected = {"loss": 4.5, "loss_document": 13 / 3, "loss_thinking": 14 / 3}
    means = objective.metrics({name: float(value) for name, value in sums.items()})
    assert means == {**expected, "perplexity": pytest.approx(90.0171313), "source_loss/a": 6.0, "source_loss/c": 3.0}
    _, unnamed = objective(losses, batch)
    assert {name: float(value) for name, value in unnamed.items() if value} == {
        **{"loss": 27.0, "tokens": 6.0, "thinking_loss": 14.0, "thinking_tokens": 3.0}
    }


def compare_paths(rank: int, size: int) -> None:
    parallel, length = ParallelConfig(tensor_parallel_size=size), 16
    model = GPTConfig(vocab_size=300, num_layers=1, hidden_size=32, ffn_hidden_size=64, num_query_groups=2)
    gpt = build_model(model, parallel, TrainingConfig(dtype="float32", sequence_length=length), seed=0)
    text = torch.randint(300, (2, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {
        "labels": text[:, 1:].contiguous(),
        "loss_mask": (torch.arange(2 * length) % 3 > 0).view(2, length).float(),
        "is_thinking": (torch.arange(2 * length) % 5 > 2).view(2, length),
    }
    found = {}
    for needs in ("token_losses", "logits"):
        gpt.zero_grad()
        labels = batch["labels"] if needs == "token_losses" else None
        outputs = gpt(text[:, :-1], torch.arange(length).expand(2, -1), None, labels=labels)
        loss, sums = LanguageModeling(needs=needs)(outputs, batch)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in gpt.parameters()]
        found[needs] = [loss.detach(), *sums.values(), *gradients]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_logits_give_the_loss_and_gradients_of_token_losses(size: int) -> None:
    on_tensor_parallel_ranks(size, compare_paths)
