"""What the trainer's models say of rollouts, at the start of an iteration: log-probabilities, entropies, and REPRO's
losses on the right answer. All ranks call every function, with the same arguments, and get the same results."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tpt import platform
from megatron_tpt.config.rl import ReproConfig
from megatron_tpt.generation import ScoringRequest
from megatron_tpt.rl.curves import Curves, Cutter, curves_of
from megatron_tpt.rl.experience import Experience, Sample
from megatron_tpt.rl.repro import Cuts
from megatron_tpt.rl.rows import Branch, Packer, Rows, Tokens, Tree, length_of, length_of_tree, mask_of
from megatron_tpt.training.batches import Batch
from megatron_tpt.training.model import Model


class Scorer:
    """Forward passes of models over packed sequences."""

    def __init__(self, packer: Packer, vocab_size: int, sequences_at_once: int) -> None:
        """`sequences_at_once` bounds what is in memory."""
        self._packer = packer
        self._vocab_size = vocab_size
        self._at_once = sequences_at_once

    def statistics(self, model: Model, sequences: Sequence[Tokens], temperature: float = 1.0) -> Tensor:
        """Log-probabilities and entropies, in nats: fp32 [2, B, T]."""
        return self._predictions(
            sequences,
            self._packer.rows,
            lambda batch: model.token_statistics(batch, self._vocab_size, temperature),
        )

    def values(self, critic: Model, sequences: Sequence[Tokens]) -> Tensor:
        """The critic's: fp32 [B, T]."""
        return self._predictions(
            sequences, self._packer.rows, lambda batch: critic.predictions(batch, "logits", lambda _, out: out)
        )[0]

    def log_probabilities_of_trees(self, model: Model, trees: Sequence[Tree]) -> tuple[Tensor, int]:
        """Those of the B branches of all trees, at temperature 1, fp32 [B, T]; and the number of tokens computed for
        them: what branches share is computed once where the model's attention takes a mask."""
        if not model.takes_branches:
            sequences = [branch.tokens for tree in trees for branch in tree]
            return self.statistics(model, sequences)[0], sum(map(length_of, sequences))
        values = self._predictions(
            trees, self._packer.rows_of_trees, lambda batch: model.token_statistics(batch, self._vocab_size)
        )
        return values[0], sum(map(length_of_tree, trees))

    def _predictions[T](
        self, sequences: Sequence[T], pack: Callable[[Sequence[T]], Rows], compute: Callable[[Batch], Tensor]
    ) -> Tensor:
        """[num_values, B, T] from what `compute` makes of a batch, [num_values, num_samples, s]."""
        parts = []
        for some in itertools.batched(sequences, self._at_once):
            rows = pack(some)
            parts.append(rows.take(self._packer.gather(compute(self._packer.batch(rows)))))
        longest = max(part.shape[-1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts]
        return torch.cat(padded, dim=-2)

    def score_requests(self, model: Model, requests: Sequence[ScoringRequest]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of every rank's own requests (rollouts.TrainerLogProbabilities): each rank
        gives other requests, and gets their results."""
        every = platform.gather_objects([Tokens(one.context, one.continuation) for one in requests])
        values = self.statistics(model, [one for own in every for one in own])[0]
        begin = sum(map(len, every[: torch.distributed.get_rank()]))
        own = values[begin : begin + len(requests)]
        return [row[: len(one.continuation)].tolist() for row, one in zip(own, requests, strict=True)]


class Process(NamedTuple):
    """REPRO's curves of an iteration."""

    samples: list[Sample]
    """With `cuts` and `answer_losses`."""
    curves: Curves
    num_tokens: int
    """Tokens that were computed to score all answers."""
    unclosed_share: float
    """Of the rollouts, those whose thinking does not end."""


class ProcessScorer:
    """REPRO's J: the policy's log-probability of the right answer after parts of a rollout's thinking."""

    def __init__(self, scorer: Scorer, settings: ReproConfig, tokenizer: Any) -> None:
        self._scorer = scorer
        self._settings = settings
        self._cutter = Cutter(settings, tokenizer)

    def __call__(self, model: Model, experience: Experience) -> Process:
        """The process rewards of an iteration's rollouts, whose column `entropy` is there."""
        entropies = experience.columns["entropy"].tolist()
        responses = [one.token_ids if one.is_truncated else one.token_ids[:-1] for one in experience.samples]
        cuts = [self._cutter.cuts(ids, row[: len(ids)]) for ids, row in zip(responses, entropies, strict=True)]
        trees = [self._tree(one, own) for one, own in zip(experience.samples, cuts, strict=True)]
        log_probs, num_tokens = self._scorer.log_probabilities_of_trees(model, trees)
        is_scored = mask_of([branch.tokens for tree in trees for branch in tree])
        positions = [own.positions for own in cuts]
        curves = curves_of(
            log_probs[is_scored], is_scored.sum(dim=1), positions, experience.mask.shape[1], self._settings
        )
        return Process(
            [
                replace(one, cuts=own, answer_losses=losses)
                for one, own, losses in zip(experience.samples, positions, curves.losses, strict=True)
            ],
            curves,
            num_tokens,
            sum(not own.is_closed for own in cuts) / len(cuts),
        )

    def _tree(self, sample: Sample, cuts: Cuts) -> Tree:
        """A branch for every cut. The last token before the cut is the branch's own, as it predicts something else than
        in the trunk."""
        sequences = self._cutter.sequences(sample.prompt_ids, sample.token_ids, sample.answer, cuts)
        return [
            Branch(len(sample.prompt_ids) + cut - 1, Tokens(*one))
            for cut, one in zip(cuts.positions, sequences, strict=True)
        ]
