"""REPRO in a trainer of verl 0.9, whose batches are in its TransferQueue. verl_plugin.py makes the trainer of it.

verl's advantage estimators are given rewards, masks and prompts, not process rewards, so REPRO is a part of the
trainer. After verl's advantages of the outcome the rollouts are cut, the policy computes the log-probabilities of the
right answer after every cut (with the weights, and by the call, of its old log-probabilities), and the process
advantages are added. curves.py and repro.py do the rest, as for our trainer.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.utils.transferqueue_utils import tq
from verl.workers.utils.padding import response_from_nested, response_to_nested

from megatron_tpt.config.convert import Converter
from megatron_tpt.config.rl import Algorithm, ReproConfig, can_be_appended
from megatron_tpt.errors import UserError, require
from megatron_tpt.rl.curves import Cutter, curve_metrics, curves_of
from megatron_tpt.rl.repro import process_advantages
from megatron_tpt.think_tags import CLOSE_TAG

_ALGORITHMS: dict[str, Algorithm] = {
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
    "gae": "ppo",
}
"""By algorithm.adv_estimator."""
_FIELDS = ("prompts", "responses", "response_mask", "loss_mask", "entropy", "advantages", "uid", "reward_model")

type Scored = tuple[Sequence[int], Sequence[int]]
"""A context, and the token ids after it whose log-probabilities are asked for."""


class ReproOptions(NamedTuple):
    """What a configuration of verl says of REPRO."""

    settings: ReproConfig
    """Its section `repro`, which has the fields of our recipes."""
    algorithm: Algorithm
    gamma: float
    lam: float

    @classmethod
    def of(cls, config: Any) -> Self:
        """Raises UserError for settings that there are not, and for what REPRO cannot be added to."""
        algorithm, section = config.algorithm, dict(config.get("repro") or {})
        names = {field.name for field in dataclasses.fields(ReproConfig)} - {"enabled"}
        if unknown := section.keys() - names:
            raise UserError(f"repro.{min(unknown)}: there is no such setting: {', '.join(sorted(names))}")
        estimator = str(getattr(algorithm.adv_estimator, "value", algorithm.adv_estimator))
        require(
            estimator in _ALGORITHMS,
            f"algorithm.adv_estimator={estimator} has no process advantages: give {', '.join(_ALGORITHMS)}",
        )
        correction = algorithm.get("rollout_correction") or {}
        require(
            not correction.get("bypass_mode", False),
            "algorithm.rollout_correction.bypass_mode=true computes no entropies, by which segments are chosen: turn "
            "it off",
        )
        name = _ALGORITHMS[estimator]
        if name == "grpo" and not algorithm.get("norm_adv_by_std_in_grpo", True):
            name = "dr_grpo"
        converter = Converter(where=lambda key: "")
        settings = converter.section(ReproConfig, section | {"enabled": True}, ("repro",))
        converter.raise_problems()
        return cls(settings, name, float(algorithm.gamma), float(algorithm.lam))


class ReproAdvantages:
    """A mixin before a trainer of verl (verl.trainer.ppo.v1.PPOTrainer), whose advantages it adds to."""

    actor_rollout_wg: Any
    tokenizer: Any
    global_steps: int

    def __init__(self, config: Any) -> None:
        self._repro = ReproOptions.of(config)  # first: it refuses what cannot run
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's step: its own advantages, and REPRO's added to them."""
        rows = {key: tag for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)}
        result = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        begin = time.perf_counter()
        self._add_process(list(rows), batch.partition_id, len(batch), metrics)
        metrics["timing_s/repro"] = time.perf_counter() - begin
        return result

    def _add_process(self, keys: Sequence[str], partition: str, at_once: int, metrics: dict[str, Any]) -> None:
        """Add the process advantages to those of the rollouts with these keys."""
        settings, algorithm, gamma, lam = self._repro
        fields = [*_FIELDS, *(["values"] if algorithm == "ppo" else [])]
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition, select_fields=fields)
        rollouts = _rollouts(data, keys, self.tokenizer)
        cutter = Cutter(settings, self.tokenizer)
        cuts = [cutter.cuts(one.token_ids, one.entropies) for one in rollouts]
        sequences = [
            sequence
            for one, own in zip(rollouts, cuts, strict=True)
            for sequence in cutter.sequences(one.prompt_ids, one.token_ids, one.answer, own)
        ]
        log_probs = score(self.actor_rollout_wg, sequences, at_once)
        mask = _padded(data["loss_mask"]) > 0
        num_scored = torch.tensor([len(scored) for _, scored in sequences])
        positions = [own.positions for own in cuts]
        curves = curves_of(torch.cat(log_probs), num_scored, positions, mask.shape[1], settings)
        names = list(data["uid"])
        process = process_advantages(
            algorithm,
            curves.rewards,
            mask,
            torch.tensor([names.index(name) for name in names]),
            values=_padded(data["values"]) if algorithm == "ppo" else None,
            gamma=gamma,
            lam=lam,
            control=settings.control,
            name=f"process rewards/{self.global_steps}",
        )
        # A rejection of tokens may have changed the mask.
        added = settings.alpha * process * _padded(data["response_mask"])
        joined = response_to_nested(_padded(data["advantages"]) + added, data["responses"])
        fields_to_put = TensorDict({"advantages": joined}, batch_size=len(keys))
        tq.kv_batch_put(keys=list(keys), partition_id=partition, fields=fields_to_put)
        metrics |= curve_metrics(curves)
        metrics["repro/unclosed"] = sum(not own.is_closed for own in cuts) / len(cuts)
        metrics["repro/scored_tokens"] = sum(len(context) + len(scored) for context, scored in sequences)
        metrics["repro/advantage_mean"] = added[mask].mean().item()


class _Rollout(NamedTuple):
    """What REPRO needs of a rollout."""

    prompt_ids: list[int]
    token_ids: list[int]
    """Without the token that ended it."""
    entropies: list[float]
    answer: Any
    """The right one."""


def _rollouts(data: TensorDict, keys: Sequence[str], tokenizer: Any) -> list[_Rollout]:
    """The rollouts in a batch. Raises UserError for those that REPRO cannot score."""
    ends = {id for id in tokenizer.all_special_ids if CLOSE_TAG not in tokenizer.decode([id])}
    result = []
    columns = (data[name].unbind() for name in ("prompts", "responses", "loss_mask", "entropy"))
    for key, prompt, response, mask, entropy, reward_model in zip(
        keys, *columns, list(data["reward_model"]), strict=True
    ):
        require(
            key.endswith("_0") and bool(mask.all()),
            f"rollout {key} has several turns, which REPRO does not score: give an agent loop of one turn",
        )
        answer = reward_model["ground_truth"]
        require(
            can_be_appended(answer),
            f"REPRO appends reward_model.ground_truth as a model would write it, which {str(answer)[:60]!r} is not: "
            f"give the answer alone",
        )
        ids = response.tolist()
        length = len(ids) - (ids[-1] in ends)
        result.append(_Rollout(prompt.tolist(), ids[:length], entropy.tolist()[:length], answer))
    return result


def score(workers: Any, sequences: Sequence[Scored], at_once: int) -> list[Tensor]:
    """Log-probabilities at temperature 1 of the scored tokens of every sequence, from the workers of verl's actor.

    `at_once` is the size of their batches, such as that of the rollouts, which their number and micro-batches divide;
    the last one is filled with sequences of two tokens.
    """
    num_ranks = max(workers._dispatch_info["actor"]) + 1  # there since the old log-probabilities
    results: list[Tensor] = []
    for some in itertools.batched(sequences, at_once):
        filler = ([some[0][0][0]], [some[0][0][0]])
        filled = [*some, *([filler] * (at_once - len(some)))]
        lengths = torch.tensor([len(context) + len(scored) for context, scored in filled])
        parts = get_seqlen_balanced_partitions(calculate_workload(lengths), num_ranks, equal_size=True)
        order = [number for part in parts for number in part]
        data = scoring_batch([filled[number] for number in order])
        output = workers.compute_log_prob(data)
        found = response_from_nested(output["log_probs"], data["loss_mask"]).unbind()
        by_number = dict(zip(order, found, strict=True))
        results += [by_number[number].float().cpu() for number in range(len(some))]
    return results


def scoring_batch(sequences: Sequence[Scored]) -> TensorDict:
    """Sequences as verl's engines take them, which compute every token's log-probability."""
    ids = [torch.tensor([*context, *scored]) for context, scored in sequences]
    columns = {
        "input_ids": ids,
        "position_ids": [torch.arange(len(one)) for one in ids],
        "loss_mask": [torch.ones(len(scored), dtype=torch.int64) for _, scored in sequences],
    }
    batch: TensorDict = tensordict_utils.get_tensordict(
        {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()},
        {"temperature": 1.0, "compute_loss": False, "calculate_entropy": False},
    )
    return batch


def _padded(values: Tensor) -> Tensor:
    """[B, T] with zeros behind the end of a response."""
    return values.to_padded_tensor(0) if values.is_nested else values
