"""verl, an independent implementation, as the reference."""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))  # training_runs.py

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
    """verl configures the root logger, whose handlers would show other tests' lines twice, and sets variables."""
    handlers, level, environment = logging.root.handlers[:], logging.root.level, dict(os.environ)
    try:
        return importlib.import_module(name)
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
