"""Trains as megatron_tpt.rl does, but the engine of one rank fails while it samples; a server is killed.

The argument --fail=RANK:CALL[:always] says at which call of the engine's generate, after two of its completions; with
`always`, at every call from there on.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from running_servers import newest_server

from megatron_tpt.generation.transformers_engine import TransformersEngine
from megatron_tpt.generation.vllm_engine import VLLMEngine
from megatron_tpt.generation.vllm_server import VLLMServerEngine
from megatron_tpt.rl.__main__ import main as train


def main() -> None:
    """Break the engines, and train."""
    option = next(argument for argument in sys.argv if argument.startswith("--fail="))
    sys.argv.remove(option)
    rank, call, *always = option.removeprefix("--fail=").split(":")
    for kind in (TransformersEngine, VLLMEngine, VLLMServerEngine):
        break_engine(kind, int(rank), int(call), always=bool(always))
    train()


def break_engine(kind: Any, rank: int, call: int, *, always: bool) -> None:
    """Have all engines of a kind fail."""
    calls, whole = itertools.count(), kind.generate

    def generate(self: Any, requests: Iterable[Any]) -> Iterator[Any]:
        number = next(calls)
        is_broken = number >= call if always else number == call
        for place, outcome in enumerate(whole(self, requests)):
            if place == 2 and is_broken and torch.distributed.get_rank() == rank:
                if kind is not VLLMServerEngine:
                    raise RuntimeError("out of\nmemory")
                newest_server().kill()
            yield outcome

    kind.generate = generate
