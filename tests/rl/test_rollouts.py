"""Rollouts of a vLLM engine in this process, whose weights are replaced, and the faults of such an update."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model, unchanged_environment
from transformers import LlamaForCausalLM

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Engine, EngineError, EngineOptions, ScoringRequest, open_engine, vllm_engine
from megatron_tpt.rl.rollouts import (
    NEEDS,
    Rollout,
    RolloutKey,
    RolloutOptions,
    RolloutPrompt,
    check_engine,
    sample_rollouts,
    update_engine,
)

PROMPTS = [
    RolloutPrompt("long", tuple(5 + i % 100 for i in range(200))),  # longer than a block of the prefix cache
    RolloutPrompt("short", (7, 8, 9)),
]
PROBES = [prompt.token_ids for prompt in PROMPTS]
OPTIONS = RolloutOptions(num_samples=3, temperature=0.7, max_new_tokens=8, seed=1)


class Model(NamedTuple):
    folder: str
    rollouts: list[Rollout]
    """Of an engine that was opened with it."""

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.folder) / "model.safetensors")

    @torch.no_grad()
    def log_probabilities(self, requests: Sequence[ScoringRequest], temperature: float = 1.0) -> list[list[float]]:
        """As a trainer with these weights computes them."""
        model = LlamaForCausalLM.from_pretrained(self.folder)
        results = []
        for context, continuation, _ in requests:
            logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
            chosen = torch.tensor(continuation)[:, None]
            results.append((logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0].tolist())
        return results


class Updated(NamedTuple):
    engine: Engine
    models: list[Model]

    def update(self, model: Model, version: int, weights: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
        """The engine gets the weights of the trainer, which trains `model`; or others, by mistake."""
        given = model.weights() if weights is None else weights
        return update_engine(self.engine, given.items(), version, PROBES, model.log_probabilities, max_gap=1e-4)


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def updated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Updated]:
    """An engine of the first of two models of one shape; "tied": the output layer shares the embedding's weights."""
    folder = tmp_path_factory.mktemp("models")
    folders = [make_model(folder / str(seed), seed=seed, tied=request.param) for seed in (0, 1)]
    with unchanged_environment():
        with open_engine(EngineOptions(folders[1], 256, max_num_seqs=4), needs=NEEDS) as engine:
            second = Model(folders[1], sample(engine))
        with open_engine(EngineOptions(folders[0], 256, max_num_seqs=4), needs=NEEDS) as engine:
            yield Updated(engine, [Model(folders[0], sample(engine)), second])


@pytest.fixture
def engine(updated: Updated) -> Iterator[Engine]:
    """It computes as the first model, and does so again after the test."""
    yield updated.engine
    updated.update(updated.models[0], 0)


def sample(engine: Engine, done: Sequence[RolloutKey] = (), iteration: int = 0) -> list[Rollout]:
    return sorted(
        sample_rollouts(engine, PROMPTS, OPTIONS, iteration=iteration, done=done), key=lambda rollout: rollout.key
    )


def assert_same(actual: list[Rollout], expected: list[Rollout]) -> None:
    """But for the last bits of log-probabilities."""
    for one, other in zip(actual, expected, strict=True):
        assert replace(one, log_probabilities=()) == replace(other, log_probabilities=())
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-5)


def test_an_updated_engine_samples_as_one_that_was_opened_with_the_new_weights(
    updated: Updated, engine: Engine
) -> None:
    first, second = updated.models
    for version, model in enumerate([second, first, second], start=1):
        metrics = updated.update(model, version)
        assert 0 < metrics["gap_max"] < 1e-4
        assert_same(sample(engine), [replace(one, weight_version=version) for one in model.rollouts])
    assert [one.token_ids for one in first.rollouts] != [one.token_ids for one in second.rollouts]


def test_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(updated: Updated) -> None:
    model = updated.models[0]
    contexts = dict(PROMPTS)
    requests = [ScoringRequest(contexts[one.key.prompt_id], one.token_ids) for one in model.rollouts]
    of_trainer = model.log_probabilities(requests, temperature=0.7)
    for rollout, expected in zip(model.rollouts, of_trainer, strict=True):
        assert rollout.log_probabilities == pytest.approx(expected, abs=1e-4)


def test_every_prompt_has_its_own_samples_in_every_iteration(updated: Updated, engine: Engine) -> None:
    rollouts = updated.models[0].rollouts
    assert [one.key for one in rollouts] == [(id, sample) for id in ("long", "short") for sample in range(3)]
    assert len({one.token_ids for one in rollouts}) == len(rollouts)
    assert {one.token_ids for one in rollouts}.isdisjoint(one.token_ids for one in sample(engine, iteration=1))
    for one in rollouts:
        assert one.is_truncated == (len(one.token_ids) == 8 and one.token_ids[-1] != 0)


def test_an_interrupted_iteration_is_completed_with_the_rollouts_that_it_would_have_had(
    updated: Updated, engine: Engine
) -> None:
    rollouts = updated.models[0].rollouts
    done = [one.key for one in rollouts[::2]]
    assert_same(sample(engine, done), rollouts[1::2])


def stale_prefix_cache(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(updated.engine._llm, "reset_prefix_cache", lambda: True)  # type: ignore[attr-defined]
    return updated.models[1].weights()


def head_of_the_old_embedding(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(vllm_engine, "repack_tied_head", lambda worker: None)
    if "lm_head.weight" in updated.models[1].weights():
        pytest.skip("an output layer of its own is packed again")
    return updated.models[1].weights()


def old_weights(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    return updated.models[0].weights()


def one_old_weight(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mlp.down_proj.weight"
    return updated.models[1].weights() | {name: updated.models[0].weights()[name]}


def missing_key(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    weights = updated.models[1].weights()
    del weights["model.norm.weight"]
    return weights


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stale_prefix_cache, "log-probabilities of engine and trainer differ by up to"),
        (head_of_the_old_embedding, "log-probabilities of engine and trainer differ by up to"),
        (old_weights, "log-probabilities of engine and trainer differ by up to"),
        (one_old_weight, "log-probabilities of engine and trainer differ by up to"),
        (missing_key, r"the update lacks 1 weight of .*: model\.norm\.weight"),
    ],
)
def test_a_faulty_update_is_detected(
    fault: Callable[[Updated, pytest.MonkeyPatch], dict[str, torch.Tensor]],
    message: str,
    updated: Updated,
    engine: Engine,
) -> None:
    check_engine(engine, PROBES, updated.models[0].log_probabilities, max_gap=1e-4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        weights = fault(updated, monkeypatch)
        with pytest.raises(EngineError, match=message):
            updated.update(updated.models[1], 1, weights)


def test_a_prompt_without_a_rollout_ends_the_iteration_and_is_no_wrong_answer(engine: Engine) -> None:
    prompts = [*PROMPTS, RolloutPrompt("too long", (5,) * 256)]
    with pytest.raises(EngineError, match=r"prompt too long has no rollout: .*prompt_too_long"):
        list(sample_rollouts(engine, prompts, OPTIONS, iteration=0))


def test_an_iteration_of_mixed_weights_is_an_error(engine: Engine) -> None:
    rollouts = sample_rollouts(engine, PROMPTS, OPTIONS, iteration=0)
    next(rollouts)
    engine.weight_version = 9
    with pytest.raises(EngineError, match="is from weights of version 9, others of iteration 0 from version 0"):
        list(rollouts)


def test_two_prompts_of_one_name_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="two prompts of iteration 3 are named short"):
        list(sample_rollouts(engine, [*PROMPTS, PROMPTS[1]], OPTIONS, iteration=3))


def test_a_temperature_of_0_is_refused() -> None:
    """Its log-probabilities would be those of another distribution."""
    with pytest.raises(UserError, match="temperature"):
        RolloutOptions(temperature=0)
