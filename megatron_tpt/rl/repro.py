"""REPRO, arXiv 2512.01925: rewards for the process of thinking, from how much it helps to predict the right answer.

The thinking of a rollout is cut where its segments begin (`choose_cuts`). The right answer is appended at every cut
(`answer_suffix`), and L is the loss of the policy on it (`answer_losses`). The curve of L over the cuts gives a score S
at every cut (`curve_scores`). The differences of S are the rewards of the segments (`segment_rewards`), placed at their
last tokens (`place_rewards`), normalized separately from the outcome rewards, summed to advantages
(`process_advantages`), and added to those of the outcome (`join`).

B rollouts of T tokens, as in advantages.py; R curves of M points, padded at their end with values that are never used.
L is computed at temperature 1, whatever temperature the rollouts were sampled at, which would change the probabilities
and not the thinking.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tpt.config.rl import Algorithm, Control, FirstReward, require_place
from megatron_tpt.errors import require
from megatron_tpt.names import seed_of
from megatron_tpt.rl.advantages import Advantages, gae, group_statistics, returns_to_go, whiten
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_DIVIDING = ("grpo", "ppo", "reinforce_plus_plus")
"""Algorithms that divide process rewards by their standard deviation."""
_SEPARATOR = re.compile(r"(?:[.?]\n|\n\n)\s*")


class Cuts(NamedTuple):
    """Where a rollout is cut. A cut i keeps the first i tokens of the response."""

    positions: list[int]
    """In rising order: where the thinking begins (for L_0), where the kept segments begin, and where the thinking
    ends. The first and the last are one if there is no thinking."""
    is_closed: bool
    """The last cut is after "</think>", and not at the end of thinking that never ends."""


class ProcessRewards(NamedTuple):
    """The rewards of segments at their last tokens, [B, T]."""

    rewards: Tensor
    is_kept: Tensor
    """Which tokens have one (bool). A reward may be 0, so this cannot be read off the rewards."""


def choose_cuts(pieces: Sequence[str], entropies: Sequence[float], num_segments: int) -> Cuts:
    """Cut the thinking of a response, whose tokens are decoded one by one, special tokens included, into `pieces`.

    A segment begins at the token with the first character other than white space after ".\\n", "?\\n" or "\\n\\n". The
    text is searched, not token ids: the tokenizer decides whether a separator is one token or several, alone or with
    other text. Of the segments inside the thinking, the `num_segments` whose first token had the highest entropy are
    kept (of equal ones the earlier); entropies[i] is that of the distribution that token i was sampled from.

    Without "</think>" all of the response is thinking: give neither padding nor the end-of-sequence token.
    """
    assert len(pieces) == len(entropies), "every token has an entropy"
    text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
    starts = [end - len(piece) for end, piece in zip(ends, pieces, strict=True)]
    opening = len(text) - len(text.lstrip()) + len(OPEN_TAG) if text.lstrip().startswith(OPEN_TAG) else 0
    closing = text.find(CLOSE_TAG, opening)
    is_closed = closing >= 0
    begin = bisect_left(starts, opening)
    end = bisect_left(starts, closing + len(CLOSE_TAG)) if is_closed else len(pieces)
    limit = closing if is_closed else len(text)
    found = _SEPARATOR.finditer(text, opening, limit)
    candidates = {bisect_right(ends, match.end()) for match in found if match.end() < limit}
    inside = sorted(token for token in candidates if begin < token < end)
    kept = sorted(inside, key=lambda token: -entropies[token])[:num_segments]
    return Cuts(sorted({begin, *kept, end}), is_closed)


def answer_suffix(
    encode: Callable[[str], Sequence[int]], answer: str, *, prefix: str, template: str, is_closed: bool
) -> tuple[list[int], list[int]]:
    """The token ids after a cut: those that are not scored, from `prefix`, and those that are, from `template` with the
    right answer in place of its "{}". (The authors' prefix is "", their template "\\\\boxed{{{}}}".)

    Small models need a prefix that closes the thinking. At a cut after "</think>" (`is_closed`) only the part of the
    prefix after the tag is used. All tokens of the template are scored, not only those of the answer, in L_0 and L_t
    alike.

    Raises UserError for a template without a place for the answer, and if `encode` adds special tokens: a
    beginning-of-sequence token inside a text is nothing that a model was trained on.
    """
    require(not list(encode("")), "the answer is encoded with special tokens: encode it without (add_special_tokens)")
    require_place(template)
    unscored = prefix.rpartition(CLOSE_TAG)[2] if is_closed else prefix
    return list(encode(unscored)), list(encode(template.format(answer)))


def answer_losses(token_losses: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """L = -J, the mean loss of the scored tokens of each row, in nats: [num_rows]. `token_losses`, [N], are negative
    log-probabilities of all scored tokens, in any order, and `row`, integers [N], is the row of each."""
    sums = torch.zeros(num_rows, dtype=torch.float64, device=token_losses.device)
    return (sums.index_add(0, row, token_losses.double()) / row.bincount(minlength=num_rows)).to(token_losses.dtype)


def curve_scores(losses: Tensor, *, stability_weight: float = 0.0, ema_weight: float = 0.01) -> Tensor:
    """S = (1 - w) magnitude + w stability of curves L, [R, M], whose first point is L_0; [R, M], from 0 to 1."""
    return (1 - stability_weight) * magnitude(losses) + stability_weight * stability(losses, ema_weight)


def magnitude(losses: Tensor) -> Tensor:
    """1 - tanh(L_t / L_0) of curves L, [R, M], which rises from 0.24 at L_0 to 1 as thinking helps. (An L_0 below 1e-6,
    of an answer that needs no thinking, is replaced by that.)

    The paper prints tanh((J_t - J_0) / J_0 + 1) + 1, which falls, as J = -L is negative.
    """
    return 1 - (losses / losses[:, :1].clamp(min=1e-6)).tanh()


def stability(losses: Tensor, ema_weight: float) -> Tensor:
    """(tau + 1) / 2 with Kendall's tau of the smoothed J = -L up to each point against time; [R, M] to [R, M].

    All pairs of points count, and a pair of equal ones neither rises nor falls (tau a). One point has no pairs: 1/2.
    `ema_weight` is the weight of the newest point in the exponential moving average. The authors' 0.01 keeps the
    average near L_0, so that tau says how often L was below the average, and not whether it fell; 1 does not smooth.
    """
    smoothed = moving_average(-losses.double(), ema_weight)
    signs = (smoothed[:, None, :] - smoothed[:, :, None]).sign().triu(1)  # [R, i, j]: has J risen from i to j > i?
    num_points = torch.arange(1, losses.shape[1] + 1, device=losses.device)
    num_pairs = (num_points * (num_points - 1) // 2).clamp(min=1)
    tau = signs.sum(dim=1).cumsum(dim=1) / num_pairs
    return ((tau + 1) / 2).to(losses.dtype)


def moving_average(values: Tensor, weight: float) -> Tensor:
    """The exponential moving average along curves [R, M], with the weight of the newest value; it begins with the
    first value."""
    averages = [values[:, 0]]
    for value in values.unbind(1)[1:]:
        averages.append(averages[-1] + weight * (value - averages[-1]))  # exact where the curve is level
    return torch.stack(averages, dim=1)


def segment_rewards(scores: Tensor, first_reward: FirstReward = "score") -> Tensor:
    """r_j = S_j - S_(j-1) of the segments between the M points of curves S: [R, M] to [R, M - 1]."""
    before = scores[:, :-1].clone()
    if first_reward == "score":
        before[:, :1] = 0
    return scores[:, 1:] - before


def place_rewards(rewards: Tensor, positions: Sequence[Sequence[int]], num_tokens: int) -> ProcessRewards:
    """Puts each segment's reward, of [B, M - 1], at the last token before the cut that ends it; T is `num_tokens`.

    `positions` are the cuts of each rollout, at most M. The first cut ends no segment, so it has no reward: nothing is
    written at its index minus 1, which can be -1.
    """
    placed = torch.zeros(len(positions), num_tokens, dtype=rewards.dtype, device=rewards.device)
    is_kept = torch.zeros_like(placed, dtype=torch.bool)
    for row, cuts in enumerate(positions):
        last_tokens = torch.tensor(cuts[1:], dtype=torch.long, device=rewards.device) - 1
        placed[row, last_tokens] = rewards[row, : len(last_tokens)]
        is_kept[row, last_tokens] = True
    return ProcessRewards(placed, is_kept)


def shuffle_rewards(process: ProcessRewards, name: str) -> ProcessRewards:
    """A control: the same rewards, each for another segment, in an order that depends on the name alone."""
    kept = process.rewards[process.is_kept]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed_of(name)))
    return process._replace(rewards=process.rewards.masked_scatter(process.is_kept, kept[order.to(kept.device)]))


def process_advantages(
    algorithm: Algorithm,
    process: ProcessRewards,
    mask: Tensor,
    groups: Tensor,
    *,
    values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    control: Control = "none",
    name: str = "",
) -> Tensor:
    """The sum of the normalized rewards of a token's own and all later segments, [B, T]; as a control, of shuffled
    rewards, in an order that `name` decides, or of `constant_rewards`.

    For PPO they are advantages by GAE with the same values of the critic, whitened.
    """
    match control:
        case "none":
            rewards = normalized_rewards(algorithm, process, groups)
        case "shuffled":
            rewards = normalized_rewards(algorithm, shuffle_rewards(process, name), groups)
        case "constant":
            rewards = constant_rewards(algorithm, process)
    if algorithm == "ppo":
        assert values is not None, "PPO has a critic"
        return gae(rewards, values, mask, gamma=gamma, lam=lam).advantages
    return returns_to_go(rewards, mask, gamma=gamma)


def normalized_rewards(algorithm: Algorithm, process: ProcessRewards, groups: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Process rewards, normalized over the kept tokens alone, the way the algorithm normalizes outcomes; [B, T].

    GRPO and PPO: (r - mean) / (std + epsilon) over all segments of a prompt's rollouts; REINFORCE++: whitened over the
    batch; its variant with a baseline: r - mean of the prompt. The paper has no others; Dr. GRPO and RLOO, which do not
    divide by a standard deviation, are treated like the last. As for outcomes, the only rollout of a prompt has no
    baseline, and its rewards are unchanged.
    """
    rewards, is_kept = process
    if algorithm == "reinforce_plus_plus":
        return whiten(rewards, is_kept)
    kept, of_kept = rewards[is_kept], groups[:, None].expand(is_kept.shape)[is_kept]
    segments = group_statistics(kept, of_kept)
    result = kept - segments.mean
    if algorithm in _DIVIDING:
        result = result / (segments.std + epsilon)
    _, member_of, num_rollouts = groups.unique(return_inverse=True, return_counts=True)
    is_alone = (num_rollouts[member_of] == 1)[:, None].expand(is_kept.shape)[is_kept]
    result = kept.where(is_alone, result)
    return torch.zeros_like(rewards).masked_scatter(is_kept, result)


def constant_rewards(algorithm: Algorithm, process: ProcessRewards, epsilon: float = 1e-6) -> Tensor:
    """A control: for every kept segment of the batch what a reward of 0 becomes when it is normalized over the batch,
    -mean / (std + epsilon), or -mean where the algorithm does not divide; [B, T]."""
    kept = process.rewards[process.is_kept]
    segments = group_statistics(kept, torch.zeros_like(kept, dtype=torch.long))
    price = segments.mean / (segments.std + epsilon) if algorithm in _DIVIDING else segments.mean
    return torch.zeros_like(process.rewards).masked_scatter(process.is_kept, -price)


def join(outcome: Advantages, process: Tensor, alpha: float) -> Advantages:
    """A + alpha A_process for the policy. The critic's returns stay those of the outcome: process advantages are
    whitened, and values are in units of reward."""
    return Advantages(outcome.advantages + alpha * process, outcome.returns)
