"""Next-token prediction: mean losses over all tokens, over documents and thinking separately, and per source."""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.objectives.objective import MicroBatch, Needs
from megatron_tpt.objectives.vocab_parallel import token_statistics


class LanguageModeling:
    """Cross-entropy of the labels, weighted by `loss_mask`, [b, s].

    `is_thinking`, [b, s], distinguishes two kinds of labels; `source`, [b], is the index in `source_names` of the
    source of a row. With several sources, the loss of each is reported; rows without `source` belong to none.
    """

    def __init__(
        self, source_names: Sequence[str] = (), unmarked_name: str = "document", *, needs: Needs = "token_losses"
    ) -> None:
        self.needs = needs
        self.source_names = tuple(source_names) if len(source_names) > 1 else ()
        self.unmarked_name = unmarked_name  # of the tokens outside of thinking
        kinds = ("loss", "tokens", "thinking_loss", "thinking_tokens")
        by_source = [f"source_{kind}/{name}" for kind in ("loss", "tokens") for name in self.source_names]
        self.sum_names = (*kinds, *by_source)

    @classmethod
    def from_recipe(cls, recipe: Recipe, source_names: Sequence[str], unmarked_name: str) -> Self:
        """As the training programs make it. A setting of a loss term is read from the recipe here."""
        return cls(source_names, unmarked_name)

    def __call__(self, outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch["loss_mask"]
        weighted = self._token_losses(outputs, batch["labels"]).float().view_as(mask) * mask
        return weighted.sum(), self._sums(weighted.detach(), batch)

    def _token_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.needs == "token_losses":
            return outputs
        return -token_statistics(outputs, labels.view(outputs.shape[:-1])).log_probabilities

    def _sums(self, weighted: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        mask, thinking = batch["loss_mask"], batch["is_thinking"].to(weighted.dtype)
        # By row, [b, 2]: loss and tokens. In fp64, sums of so few fp32 numbers are exact, so order does not matter.
        of_thinking = torch.stack([(weighted * thinking).sum(dim=1), (mask * thinking).sum(dim=1)], dim=1)
        of_documents = torch.stack([weighted.sum(dim=1), mask.sum(dim=1)], dim=1) - of_thinking
        rows = of_documents.double() + of_thinking.double()
        sums = [rows.sum(dim=0), of_thinking.double().sum(dim=0)]
        if self.source_names:
            sums.append(self._by_source(rows, batch).flatten())
        return dict(zip(self.sum_names, torch.cat(sums), strict=True))

    def _by_source(self, rows: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[b, 2] -> [2, num_sources]."""
        if "source" not in batch:
            return rows.new_zeros(2, len(self.source_names))
        return rows.T @ torch.nn.functional.one_hot(batch["source"], len(self.source_names)).double()

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean losses in nats over the tokens of each kind, if there are any, and the perplexity of all tokens."""
        if not sums["tokens"]:
            return {}
        loss = sums["loss"] / sums["tokens"]
        result = {"loss": loss}
        if document_tokens := sums["tokens"] - sums["thinking_tokens"]:
            result[f"loss_{self.unmarked_name}"] = (sums["loss"] - sums["thinking_loss"]) / document_tokens
        if sums["thinking_tokens"]:
            result["loss_thinking"] = sums["thinking_loss"] / sums["thinking_tokens"]
        result["perplexity"] = perplexity(loss)
        for name in self.source_names:
            if tokens := sums[f"source_tokens/{name}"]:
                result[f"source_loss/{name}"] = sums[f"source_loss/{name}"] / tokens
        return result


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf if it overflows."""
    return math.inf if loss > 700 else math.exp(loss)
