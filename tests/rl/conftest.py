"""verl, an independent implementation, as the reference."""

import importlib
import logging
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def verl_core() -> ModuleType:
    """verl's advantages and losses. Imported for the tests that need them: it takes seconds."""
    return _import_quietly("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="session")
def verl_correction() -> ModuleType:
    """verl's correction of the mismatch of trainer and engine."""
    return _import_quietly("verl.trainer.ppo.rollout_corr_helper")


def _import_quietly(name: str) -> ModuleType:
    """verl configures the root logger, whose handlers would show other tests' lines twice."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        return importlib.import_module(name)
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
