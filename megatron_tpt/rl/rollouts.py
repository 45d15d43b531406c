"""Rollouts: several completions of every prompt, by an engine that gets the trainer's weights between iterations.

    with open_engine(options, needs=NEEDS) as engine:
        check_engine(engine, probes, trainer, max_gap=1e-4)
        for iteration in range(num_iterations):
            for rollout in sample_rollouts(engine, prompts, rollout_options, iteration=iteration):
                ...
            ...  # training
            update_engine(engine, weights, iteration + 1, probes, trainer, max_gap=1e-4)

An engine that computes with old weights, a part of the new ones, or keys and values that old ones left in its prefix
cache, still writes fluent text: only its probabilities show the fault. So after every update it completes the same
prompts, the probes, and the trainer computes the log-probabilities of what it wrote.
"""

import collections
import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt, Le
from torch import Tensor

from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.errors import require
from megatron_tpt.generation import (
    Ability,
    Completion,
    Engine,
    EngineError,
    Failure,
    Request,
    Sampling,
    ScoringRequest,
    complete,
    derive_seed,
    servers_apart,
)
from megatron_tpt.rl.mismatch import mismatch_metrics

NEEDS: tuple[Ability, ...] = ("log-probabilities", "update_weights")
"""What an engine must be able to do."""

type TrainerLogProbabilities = Callable[[Sequence[ScoringRequest]], Sequence[Sequence[float]]]
"""The trainer's log-probabilities of every token of each continuation, at temperature 1."""

_NUM_PROBED_TOKENS = 16


class RolloutPrompt(NamedTuple):
    """A prompt and its name, which is unique in an iteration."""

    id: str
    token_ids: tuple[int, ...]
    """Not text, which engine and trainer might encode differently."""


@dataclass(frozen=True)
class RolloutOptions:
    """How rollouts are sampled. Always from all tokens (top-p 1): the probabilities of a part of them, which the engine
    would renormalize, are none that the trainer could compute."""

    num_samples: PositiveInt = 8
    """Rollouts of every prompt."""
    temperature: Annotated[float, Gt(0), Le(2)] = 1.0
    max_new_tokens: PositiveInt = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self)


class RolloutKey(NamedTuple):
    """Which rollout of an iteration."""

    prompt_id: str
    sample: int


@dataclass(frozen=True)
class Rollout:
    """One finished completion."""

    key: RolloutKey
    text: str
    token_ids: tuple[int, ...]
    """The token that ended it included."""
    log_probabilities: tuple[float, ...]
    """Of every token, in the distribution that it was drawn from (temperature included), nats."""
    weight_version: int
    """That of the weights that wrote it."""
    is_truncated: bool
    """It ended at the limit of the length."""


def sample_rollouts(
    engine: Engine,
    prompts: Iterable[RolloutPrompt],
    options: RolloutOptions,
    *,
    iteration: int,
    done: Container[RolloutKey] = (),
) -> Iterator[Rollout]:
    """`options.num_samples` completions of each prompt but those that are `done`, in the order in which they finish.

    The random numbers of a rollout depend on the seed, the iteration, and its key alone, so that an interrupted
    iteration can be completed. Raises EngineError for a prompt that the engine cannot complete, which must not be taken
    for a wrong answer, and for one that was completed with other weights than the first; UserError for two prompts with
    the same name.
    """
    version = engine.weight_version
    outcomes = engine.generate(_requests(prompts, options, iteration, done))
    with contextlib.closing(outcomes):  # type: ignore[type-var]  # abandoned at once, not when the error is forgotten
        for request, outcome in outcomes:
            key = request.key
            if isinstance(outcome, Failure):
                raise EngineError(f"prompt {key.prompt_id} has no rollout: {outcome.message} ({outcome.reason})")
            rollout = _rollout(key, outcome)
            if rollout.weight_version != version:
                raise EngineError(
                    f"a rollout of prompt {key.prompt_id} is from weights of version {rollout.weight_version}, "
                    f"others of iteration {iteration} from version {version}"
                )
            yield rollout


def update_engine(
    engine: Engine,
    weights: Iterable[tuple[str, Tensor]],
    version: int,
    probes: Sequence[Sequence[int]],
    trainer: TrainerLogProbabilities,
    *,
    max_gap: float,
) -> dict[str, float]:
    """Replaces the engine's weights (`send_weights`) and checks that it computes with them (`check_engine`).

    Raises EngineError if it does not: it must not be used then.
    """
    send_weights(engine, weights, version)
    return check_engine(engine, probes, trainer, max_gap=max_gap)


def send_weights(engine: Engine, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
    """Replaces the engine's weights (`Engine.update_weights`). All ranks call it: the weights, which take all of them
    to gather, are iterated to the end also where an engine fails."""
    try:
        engine.update_weights(weights, version)
    finally:
        collections.deque(weights, maxlen=0)
    if engine.weight_version != version:
        raise EngineError(f"the engine says version {engine.weight_version} of its weights after version {version}")


def check_engine(
    engine: Engine, probes: Sequence[Sequence[int]], trainer: TrainerLogProbabilities, *, max_gap: float
) -> dict[str, float]:
    """The mismatch of engine and trainer on what the engine writes after `probes` (`probe_engine`, `check_probes`)."""
    return check_probes(probe_engine(engine, probes), trainer, max_gap=max_gap)


def probe_engine(
    engine: Engine, probes: Sequence[Sequence[int]], place: int = 0, num_places: int = 1
) -> list[tuple[ScoringRequest, Rollout]]:
    """What the engine writes after `probes`, prompts as token ids. Each of several servers is asked, by one of
    `num_places` callers at least. Raises EngineError for a server with other weights than the engine's.

    The probes should be the same at every update, and some of them longer than a block of the prefix cache (128 tokens
    on CPUs, 16 on GPUs): others cannot show that it still holds keys and values of old weights.
    """
    sampling = Sampling(1.0, 1.0, _NUM_PROBED_TOKENS, seed=0, log_probabilities=True)
    found = []
    with servers_apart(engine, place, num_places) as engines:
        for one in engines:
            for i, completion in enumerate(complete(one, probes, sampling)):
                rollout = _rollout(RolloutKey("probe", i), completion)
                if rollout.weight_version != engine.weight_version:
                    raise EngineError(
                        f"a probe was completed by weights of version {rollout.weight_version} after an update to "
                        f"version {engine.weight_version}"
                    )
                found.append((ScoringRequest(probes[i], rollout.token_ids), rollout))
    return found


def check_probes(
    written: Sequence[tuple[ScoringRequest, Rollout]], trainer: TrainerLogProbabilities, *, max_gap: float
) -> dict[str, float]:
    """The mismatch of engine and trainer (mismatch.py) on probes.

    Raises EngineError if a log-probability differs by more than `max_gap` nats: 1e-4 is enough for fp32; for lower
    precisions, see the metrics of an engine that was just opened.
    """
    of_engine = [value for _, one in written for value in one.log_probabilities]
    of_trainer = [value for one in trainer([request for request, _ in written]) for value in one]
    metrics = mismatch_metrics(
        torch.tensor(of_trainer, dtype=torch.float64),
        torch.tensor(of_engine, dtype=torch.float64),
        torch.ones(len(of_engine), dtype=torch.bool),
    )
    if not metrics["gap_max"] <= max_gap:  # also where it is not a number
        raise EngineError(
            f"log-probabilities of engine and trainer differ by up to {metrics['gap_max']:.3g} nats (allowed: "
            f"{max_gap:g}) at version {written[0][1].weight_version} of the weights: the engine computes with other "
            "weights, or with what they left in its cache; raise the bound if only the numerical precision differs"
        )
    return metrics


def _requests(
    prompts: Iterable[RolloutPrompt], options: RolloutOptions, iteration: int, done: Container[RolloutKey]
) -> Iterator[Request]:
    """Sample by sample, so that the engine finds the prompt in its cache."""
    ids: set[str] = set()
    for prompt in prompts:
        require(prompt.id not in ids, f"two prompts of iteration {iteration} are named {prompt.id}: rename one")
        ids.add(prompt.id)
        for sample in range(options.num_samples):
            key = RolloutKey(prompt.id, sample)
            if key not in done:
                seed = derive_seed(options.seed, "rollout", iteration, *key)
                sampling = Sampling(options.temperature, 1.0, options.max_new_tokens, seed=seed, log_probabilities=True)
                yield Request(prompt.token_ids, sampling, key)


def _rollout(key: RolloutKey, completion: Completion) -> Rollout:
    log_probabilities = completion.log_probabilities or ()
    if not len(log_probabilities) == len(completion.token_ids) > 0:
        raise EngineError(
            f"the engine wrote {len(completion.token_ids)} tokens after prompt {key.prompt_id}, and gave "
            f"{len(log_probabilities)} log-probabilities"
        )
    return Rollout(
        key,
        completion.text,
        completion.token_ids,
        log_probabilities,
        completion.weight_version,
        completion.finish_reason == "length",
    )
