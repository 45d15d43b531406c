"""New weights for an engine that runs, in this process or as a server."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model, unchanged_environment
from transformers import LlamaForCausalLM

from megatron_tpt.generation import (
    Engine,
    EngineError,
    EngineOptions,
    Request,
    Sampling,
    ScoringRequest,
    complete,
    log_likelihoods,
    open_engine,
)

PROMPT = [5 + i % 100 for i in range(200)]  # longer than a block of the prefix cache
GREEDY = Sampling(temperature=0, max_new_tokens=8, log_probabilities=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of one shape; "tied": the output layer shares the embedding's weights."""
    folder = tmp_path_factory.mktemp("models")
    return [make_model(folder / str(seed), seed=seed, tied=request.param) for seed in (0, 1)]


@pytest.fixture(
    scope="module", params=["vllm", "transformers", pytest.param("vllm-server", marks=pytest.mark.slow(minutes=2))]
)
def engine(
    request: pytest.FixtureRequest, models: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    options = EngineOptions(models[0], 256, max_num_seqs=4, kind=request.param)
    if request.param == "vllm-server":
        folder = tmp_path_factory.mktemp("server")
        options = replace(options, weight_transfer="folder", weights_dir=folder / "weights", log_dir=folder / "logs")
    with unchanged_environment(), open_engine(options, needs=["update_weights"]) as engine:
        yield engine


def weights(model: str) -> dict[str, torch.Tensor]:
    return load_file(Path(model) / "model.safetensors")


@torch.no_grad()
def assert_computes(engine: Engine, model: str, version: int) -> None:
    """`engine` has the log-probabilities of `model`, and says so by `version`."""
    [completion] = complete(engine, [PROMPT], GREEDY)
    ids = [*PROMPT, *completion.token_ids]
    logits = LlamaForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert completion.token_ids == tuple(logits[len(PROMPT) - 1 :].argmax(-1).tolist())
    assert completion.log_probabilities == pytest.approx(expected[len(PROMPT) - 1 :].tolist(), abs=1e-4)
    [likelihood] = log_likelihoods(engine, [ScoringRequest(ids[:1], ids[1:])])
    assert likelihood.log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
    assert (engine.weight_version, completion.weight_version, likelihood.weight_version) == (version,) * 3


def test_an_updated_engine_computes_as_one_with_the_new_weights(models: list[str], engine: Engine) -> None:
    assert_computes(engine, models[0], version=0)
    engine.update_weights(weights(models[1]).items(), 1)
    assert_computes(engine, models[1], version=1)
    engine.update_weights(reversed(weights(models[0]).items()), 2)
    assert_computes(engine, models[0], version=2)


def test_weights_are_not_updated_under_requests_in_flight(models: list[str], engine: Engine) -> None:
    version = engine.weight_version
    outcomes = engine.generate(Request(PROMPT[i:], GREEDY) for i in range(20))
    next(outcomes)
    with pytest.raises(EngineError, match="requests are in flight"):
        engine.update_weights(weights(models[1]).items(), 7)
    assert len(list(outcomes)) == 19
    assert_computes(engine, models[0], version)


def test_an_update_that_is_not_whole_is_an_error(models: list[str], engine: Engine) -> None:
    version = engine.weight_version
    given = weights(models[1])
    del given["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(EngineError, match=r"lacks 1 weight of .*: model\.layers\.1\.mlp\.up_proj\.weight$"):
        engine.update_weights(given.items(), 7)
    assert engine.weight_version == version
    engine.update_weights(weights(models[0]).items(), 8)
    assert_computes(engine, models[0], version=8)
