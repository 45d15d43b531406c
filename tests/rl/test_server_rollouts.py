"""Rollouts of a real vLLM server whose weights are replaced, the faults of such an update, and the server's death."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running_servers import newest_server
from test_rollouts import (
    OPTIONS,
    PROBES,
    PROMPTS,
    Model,
    Updated,
    assert_same,
    missing_key,
    old_weights,
    one_old_weight,
    sample,
)
from tiny_models import make_model, unchanged_environment

from megatron_tpt.generation import EngineError, EngineOptions, open_engine
from megatron_tpt.generation.server_weights import Control
from megatron_tpt.rl.rollouts import NEEDS, check_engine, sample_rollouts

pytestmark = pytest.mark.slow(minutes=3)


@pytest.fixture(scope="module", params=["tied", "untied"])
def updated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Updated]:
    """A server of the first of two models of one shape, and the rollouts of vLLM in this process for both."""
    folder = tmp_path_factory.mktemp("models")
    folders = [make_model(folder / str(seed), seed=seed, tied=request.param == "tied") for seed in (0, 1)]
    models = []
    with unchanged_environment():
        for one in folders:
            with open_engine(EngineOptions(one, 256, max_num_seqs=4), needs=NEEDS) as engine:
                models.append(Model(one, sample(engine)))
    options = EngineOptions(
        folders[0],
        256,
        max_num_seqs=4,
        kind="vllm-server",
        weight_transfer="folder",
        weights_dir=folder / "weights",
        log_dir=folder / "logs",
    )
    with open_engine(options, needs=NEEDS) as engine:
        yield Updated(engine, models)


def versioned(model: Model, version: int) -> list[Any]:
    return [replace(one, weight_version=version) for one in model.rollouts]


def test_an_updated_server_samples_as_an_engine_that_was_opened_with_the_new_weights(updated: Updated) -> None:
    first, second = updated.models
    assert_same(sample(updated.engine), versioned(first, 0))
    for version, model in enumerate([second, first, second], start=1):
        metrics = updated.update(model, version)
        assert 0 < metrics["gap_max"] < 1e-4
        assert_same(sample(updated.engine), versioned(model, version))


def stale_prefix_cache(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    asked = Control.on_all

    def on_all(self: Control, path: str, body: Any = None) -> list[Any]:
        if path == "reset_prefix_cache":
            return [{"success": True}]
        return asked(self, path + "&clear_cache=false" if path.startswith("pause") else path, body)

    monkeypatch.setattr(Control, "on_all", on_all)
    return updated.models[1].weights()


def head_of_the_old_embedding(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What vLLM's own method leaves."""
    asked = Control.on_all

    def on_all(self: Control, path: str, body: Any = None) -> list[Any]:
        if path == "collective_rpc":
            body = {"method": "reload_weights", "kwargs": {"weights_path": body["args"][0]}}
        return asked(self, path, body)

    monkeypatch.setattr(Control, "on_all", on_all)
    if "lm_head.weight" in updated.models[1].weights():
        pytest.skip("an output layer of its own is packed again")
    return updated.models[1].weights()


def version_not_set(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    asked = Control.on_all
    monkeypatch.setattr(
        Control,
        "on_all",
        lambda self, path, body=None: [] if path == "update_weight_version" else asked(self, path, body),
    )
    return updated.models[1].weights()


GAP = "log-probabilities of engine and trainer differ by up to"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stale_prefix_cache, GAP),
        (head_of_the_old_embedding, GAP),
        (old_weights, GAP),
        (one_old_weight, GAP),
        (missing_key, r"the update lacks 1 weight of .*: model\.norm\.weight"),
        (version_not_set, "servers say versions 1 of their weights after version 2"),
    ],
)
def test_a_faulty_update_is_detected(
    fault: Callable[[Updated, pytest.MonkeyPatch], dict[str, torch.Tensor]], message: str, updated: Updated
) -> None:
    updated.update(updated.models[0], 1)
    sample(updated.engine)  # fills the cache
    check_engine(updated.engine, PROBES, updated.models[0].log_probabilities, max_gap=1e-4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        weights = fault(updated, monkeypatch)
        with pytest.raises(EngineError, match=message):
            updated.update(updated.models[1], 2, weights)


def test_rollouts_of_a_server_that_was_restarted_do_not_count_until_it_has_the_weights(updated: Updated) -> None:
    updated.update(updated.models[1], 5)
    with pytest.raises(EngineError, match="is from weights of version 0, others of iteration 0 from version 5"):
        for i, _ in enumerate(sample_rollouts(updated.engine, PROMPTS, OPTIONS, iteration=0)):
            if i == 0:
                os.kill(newest_server().pid, signal.SIGKILL)
    updated.update(updated.models[1], 5)
    assert_same(sample(updated.engine), versioned(updated.models[1], 5))


def test_what_is_asked_without_the_key_is_refused(updated: Updated) -> None:
    """Also the routes for updates, which vLLM leaves open."""
    control = updated.engine._engine._weights._control  # type: ignore[attr-defined]
    control = Control(control._urls, "other", 10)
    for path in ("collective_rpc", "pause?mode=abort", "update_weights", "v1/completions"):
        with pytest.raises(Exception, match=r"answered 401 \(the key is missing or wrong\)"):
            control.on_all(path)


def test_the_folder_has_the_weights_of_one_version(updated: Updated, tmp_path: Path) -> None:
    for version in (7, 8):
        updated.update(updated.models[1], version)
    weights = Path(updated.models[0].folder).parent / "weights"
    assert [one.name for one in weights.iterdir()] == ["version_00000008"]
