"""REPRO's curves, for a trainer of any kind: the sequences that its policy has to score, and what follows from the
scores.

A rollout is cut (`Cutter.cuts`), and the right answer appended at every cut (`Cutter.sequences`). From the policy's
log-probabilities of the answers at temperature 1 follow the curves L, the scores S and the rewards (`curves_of`).
repro.py has the formulas; scoring.py scores with our trainer, verl_process.py with verl's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tpt.config.rl import ReproConfig
from megatron_tpt.rl.repro import (
    Cuts,
    ProcessRewards,
    answer_losses,
    answer_suffix,
    choose_cuts,
    curve_scores,
    place_rewards,
    segment_rewards,
)


class Curves(NamedTuple):
    """The curves of B rollouts."""

    losses: list[list[float]]
    """L at every cut of every rollout."""
    scores: list[list[float]]
    """S there."""
    rewards: ProcessRewards


class Cutter:
    """Cuts rollouts and appends the right answer."""

    def __init__(self, settings: ReproConfig, tokenizer: Any) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def cuts(self, token_ids: Sequence[int], entropies: Sequence[float]) -> Cuts:
        """The cuts of a response without the token that ended it; `entropies` has a value for each of its tokens."""
        return choose_cuts(self._decoded(token_ids), entropies, self._settings.num_segments)

    def sequences(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], answer: Any, cuts: Cuts
    ) -> list[tuple[list[int], list[int]]]:
        """For every cut the token ids that are not scored (the prompt, the response before the cut, the prefix of the
        answer), and those that are."""
        result = []
        for cut in cuts.positions:
            unscored, scored = answer_suffix(
                self._encode,
                str(answer),
                prefix=self._settings.answer_prefix,
                template=self._settings.answer_template,
                is_closed=cuts.is_closed and cut == cuts.positions[-1],
            )
            result.append(([*prompt_ids, *token_ids[:cut], *unscored], scored))
        return result

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _decoded(self, ids: Sequence[int]) -> list[str]:
        """Tokens one by one as text."""
        for id in set(ids) - self._pieces.keys():
            self._pieces[id] = self._tokenizer.decode(
                [id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return [self._pieces[id] for id in ids]


def curves_of(
    log_probs: Tensor, num_scored: Tensor, cuts: Sequence[Sequence[int]], num_tokens: int, settings: ReproConfig
) -> Curves:
    """The curves of rollouts with these cuts. `log_probs`, [N], are those of the scored tokens of all sequences, one
    after another; `num_scored` is how many each sequence has; `num_tokens` is the T of the rewards."""
    row = torch.arange(len(num_scored), device=log_probs.device).repeat_interleave(num_scored)
    losses = answer_losses(-log_probs, row, len(num_scored)).split([len(positions) for positions in cuts])
    # Behind its end a curve is level: what is computed there is never used.
    points = max(map(len, losses))
    padded = torch.stack([torch.cat([one, one[-1:].expand(points - len(one))]) for one in losses])
    scores = curve_scores(padded, stability_weight=settings.stability_weight, ema_weight=settings.ema_weight)
    return Curves(
        [one.tolist() for one in losses],
        [row[: len(one)].tolist() for row, one in zip(scores, losses, strict=True)],
        place_rewards(segment_rewards(scores, settings.first_reward), cuts, num_tokens),
    )


def curve_metrics(curves: Curves) -> dict[str, float]:
    """The mean loss on the right answer without thinking (`repro/L_first`), after a quarter, half and three quarters of
    the cuts, and at the end of the thinking (`repro/L_last`); the score there; kept `segments` of a rollout."""
    names = ("first", "quarter", "half", "three_quarters", "last")
    metrics = {
        f"repro/L_{name}": _mean([curve[round(share / 4 * (len(curve) - 1))] for curve in curves.losses])
        for share, name in enumerate(names)
    }
    metrics["repro/S_last"] = _mean([scores[-1] for scores in curves.scores])
    metrics["repro/segments"] = _mean([float(len(curve) - 1) for curve in curves.losses])
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
