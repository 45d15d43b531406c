"""verl, an independent implementation, as the reference."""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))  # training_runs.py

from rl_runs import EVERY_STEP, PROGRAM, THINKING, make_problems, make_start, merged, rl_recipe, write_recipe
from training_runs import Workers

VERL = Path(sys.prefix) / "verl"
"""Where tools/setup.sh installs it, see requirements/verl.txt."""


@pytest.fixture(scope="session")
def verl_core(verl_on_path: None) -> ModuleType:
    """verl's advantages and losses. Imported for the tests that need them: it takes seconds."""
    return _import_quietly("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="session")
def verl_correction(verl_on_path: None) -> ModuleType:
    """verl's correction of the mismatch of trainer and engine."""
    return _import_quietly("verl.trainer.ppo.rollout_corr_helper")


@pytest.fixture(scope="session")
def verl_on_path() -> Iterator[None]:
    """Behind everything else, so that no other import finds something there."""
    if sys.version_info >= (3, 13):
        pytest.skip("verl 0.9.1 is for Python before 3.13")
    sys.path.append(str(VERL))
    yield
    sys.path.remove(str(VERL))


def _import_quietly(name: str) -> ModuleType:
    """verl configures the root logger, whose handlers would show other tests' lines twice, and sets variables. Our
    plug-in, which it would load, needs more than is installed here."""
    handlers, level, environment = logging.root.handlers[:], logging.root.level, dict(os.environ)
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    try:
        return importlib.import_module(name)
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="session")
def workers() -> Workers:
    return Workers()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture(scope="session")
def whole(workers: Workers, start: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Runs of one process by the name of their algorithm: the run folder."""
    done: dict[str, Path] = {}

    def run(name: str, changes: dict[str, Any]) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("whole") / name
            recipe = rl_recipe(start, problems, folder, **merged(THINKING, changes, EVERY_STEP))
            workers.run(PROGRAM, [str(write_recipe(recipe))], 1)
            done[name] = folder
        return done[name]

    return run
