"""What an iteration learns from: its rollouts with their rewards, and values of every kind for each of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from megatron_tpt.rl.rows import Tokens, mask_of

CORRECT = "correct"
"""The reward of the answer, by which groups are compared in dynamic sampling."""


@dataclass(frozen=True)
class Sample:
    """A rollout, graded: a line of the rollout log."""

    position: int
    """Of its prompt, among all that the run has sampled from."""
    sample: int
    """Its number among the rollouts of the prompt, from 0."""
    prompt_id: str
    prompt: str
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    """Of the response, the token that ended it included."""
    log_probabilities: list[float]
    """The engine's."""
    weight_version: int
    """The optimizer steps that the weights had seen."""
    is_truncated: bool
    answer: Any
    """The right one."""
    reason: str | None
    """Why the response is wrong; None for a right one."""
    rewards: dict[str, float]
    """By name; the reward is their sum."""
    is_used: bool = True
    """Whether it is trained on: not in a group that dynamic sampling has dropped."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """Values of its tokens by name, see `Experience.columns`."""
    cuts: list[int] = field(default_factory=list)
    """Where REPRO has cut it, in tokens of the response."""
    answer_losses: list[float] = field(default_factory=list)
    """REPRO's L = -J at every cut, nats per token."""

    @property
    def tokens(self) -> Tokens:
        """Prompt and response."""
        return Tokens(self.prompt_ids, self.token_ids)

    @property
    def is_correct(self) -> bool:
        """Whether the answer is right."""
        return self.rewards[CORRECT] > 0

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


class Experience:
    """The B used rollouts of an iteration, the same on all ranks; tensors on the CPU."""

    def __init__(self, samples: Sequence[Sample], columns: Mapping[str, Tensor]) -> None:
        self.samples = list(samples)
        self.columns = dict(columns)
        """fp32 [B, T], 0 behind the end of a response: `engine`, `old` and `reference` log-probabilities, `entropy`,
        critic's `value`, `advantage`, critic's `return`, and `process`, the part of the advantage that is REPRO's."""
        self.mask = mask_of([one.tokens for one in samples])
        """bool [B, T]: the tokens of responses."""
        positions = torch.tensor([one.position for one in samples])
        self.groups = positions
        """[B]: equal for rollouts of one prompt."""

    @classmethod
    def collected(cls, samples: Sequence[Sample]) -> Self:
        """Rollouts that are not scored yet."""
        columns = {"engine": padded([one.log_probabilities for one in samples])}
        return cls(samples, columns)

    @classmethod
    def read(cls, samples: Sequence[Sample]) -> Self:
        """From the lines that `lines` has made."""
        columns = {name: padded([one.columns[name] for one in samples]) for name in samples[0].columns}
        return cls(samples, {"engine": padded([one.log_probabilities for one in samples]), **columns})

    def lines(self) -> list[Sample]:
        """The samples with their columns. fp32 survives: a float is written with all digits."""
        lengths = self.mask.sum(dim=1).tolist()
        names = [name for name in self.columns if name != "engine"]
        rows = {name: self.columns[name].tolist() for name in names}
        return [
            replace(one, columns={name: rows[name][b][:length] for name in names})
            for b, (one, length) in enumerate(zip(self.samples, lengths, strict=True))
        ]

    @property
    def scores(self) -> Tensor:
        """The reward of every rollout, fp32 [B]."""
        return torch.tensor([sum(one.rewards.values()) for one in self.samples])

    @property
    def is_correct(self) -> Tensor:
        """bool [B]."""
        return torch.tensor([one.is_correct for one in self.samples])

    @property
    def is_truncated(self) -> Tensor:
        """bool [B]."""
        return torch.tensor([one.is_truncated for one in self.samples])


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """fp32 [B, T] with zeros behind the end of a row."""
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
