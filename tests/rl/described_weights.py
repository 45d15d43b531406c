"""Trains as megatron_tpt.rl does, and compares what describes the weights that engines get with these weights."""

from typing import Any

from megatron_tpt.generation import Engine
from megatron_tpt.rl import collecting
from megatron_tpt.rl.__main__ import main as train
from megatron_tpt.rl.rollouts import send_weights


def main() -> None:
    """Train."""
    collecting.send_weights = send_compared
    train()


def send_compared(engine: Engine, weights: Any, version: int) -> None:
    """Send the weights."""
    found = []

    def recorded() -> Any:
        for name, tensor in weights:
            found.append((name, tensor.dtype, tuple(tensor.shape)))
            yield name, tensor

    described = weights.metadata()
    send_weights(engine, recorded(), version)
    assert found == described and len(found) > 10, (found, described)
