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
from megatron_tpt.rl.experience import Experience, Sample
from megatron_tpt.rl.repro import (
    ProcessRewards,
    answer_losses,
    answer_suffix,
    choose_cuts,
    curve_scores,
    place_rewards,
    segment_rewards,
)
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
    scores: list[list[float]]
    """S at every cut of every sample."""
    rewards: ProcessRewards
    num_tokens: int
    """Tokens that were computed to score all answers."""
    unclosed_share: float
    """Of the rollouts, those whose thinking does not end."""


class ProcessScorer:
    """REPRO's J: the policy's log-probability of the right answer after parts of a rollout's thinking."""

    def __init__(self, scorer: Scorer, settings: ReproConfig, tokenizer: Any) -> None:
        self._scorer = scorer
        self._settings = settings
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def __call__(self, model: Model, experience: Experience) -> Process:
        """The process rewards of an iteration's rollouts, whose column `entropy` is there."""
        entropies = experience.columns["entropy"].tolist()
        cuts = [
            choose_cuts(pieces, row[: len(pieces)], self._settings.num_segments)
            for pieces, row in zip(map(self._decoded, experience.samples), entropies, strict=True)
        ]
        trees = [
            self._tree(one, positions, is_closed)
            for one, (positions, is_closed) in zip(experience.samples, cuts, strict=True)
        ]
        log_probs, num_tokens = self._scorer.log_probabilities_of_trees(model, trees)
        is_scored = mask_of([branch.tokens for tree in trees for branch in tree])
        row = torch.arange(len(is_scored)).repeat_interleave(is_scored.sum(dim=1))
        losses = answer_losses(-log_probs[is_scored], row, len(is_scored))
        curves = losses.split([len(positions) for positions, _ in cuts])
        # Behind its end a curve is level: what is computed there is never used.
        points = max(map(len, curves))
        padded = torch.stack([torch.cat([one, one[-1:].expand(points - len(one))]) for one in curves])
        settings = self._settings
        scores = curve_scores(padded, stability_weight=settings.stability_weight, ema_weight=settings.ema_weight)
        rewards = segment_rewards(scores, settings.first_reward)
        return Process(
            [
                replace(one, cuts=positions, answer_losses=curve.tolist())
                for one, (positions, _), curve in zip(experience.samples, cuts, curves, strict=True)
            ],
            [row[: len(one)].tolist() for row, one in zip(scores, curves, strict=True)],
            place_rewards(rewards, [positions for positions, _ in cuts], experience.mask.shape[1]),
            num_tokens,
            sum(not is_closed for _, is_closed in cuts) / len(cuts),
        )

    def _decoded(self, sample: Sample) -> list[str]:
        """The tokens of a response one by one as text, without the one that ended it."""
        ids = sample.token_ids if sample.is_truncated else sample.token_ids[:-1]
        for id in set(ids) - self._pieces.keys():
            self._pieces[id] = self._tokenizer.decode(
                [id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return [self._pieces[id] for id in ids]

    def _tree(self, sample: Sample, positions: Sequence[int], is_closed: bool) -> Tree:
        """A branch for every cut: the prompt with the thinking before it, and the right answer. The last token before
        the cut is the branch's own, as it predicts something else than in the trunk."""

        def encode(text: str) -> list[int]:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
            return ids

        result = []
        for cut in positions:
            unscored, scored = answer_suffix(
                encode,
                str(sample.answer),
                prefix=self._settings.answer_prefix,
                template=self._settings.answer_template,
                is_closed=is_closed and cut == positions[-1],
            )
            before = [*sample.prompt_ids, *sample.token_ids[:cut]]
            result.append(Branch(len(before) - 1, Tokens([*before, *unscored], scored)))
        return result
