"""Recipes and machines for tests of planning."""

import dataclasses
from typing import Any

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.planning.machine import Latencies, Machine, Shares, machine_named
from megatron_tpt.recipes.pretrain import PretrainRecipe

SMALL = {
    "num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 256,
}  # fmt: skip
SHORT = {"tensor": "tensor_parallel_size", "pipeline": "pipeline_parallel_size", "context": "context_parallel_size"}
SHORT |= {"pieces": "virtual_pipeline_parallel_size"}


def recipe(model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **parallel: Any):
    """128 tokens a sample and 16 samples a step. Sizes of groups by their first names."""
    named = {SHORT.get(name, name): value for name, value in parallel.items()}
    raw = {
        "model": SMALL | (model or {}),
        "training": {"sequence_length": 128, "global_batch_size": 16} | (training or {}),
        "parallel": {"sequence_parallel": parallel.get("tensor", 1) > 1} | named,
        "data": {"mock": True},
    }
    return recipe_from_dict(PretrainRecipe, raw)


def perfect(machine: Machine | None = None) -> Machine:
    """A machine that reaches its peaks, and moves bytes in no time."""
    machine = machine or machine_named("h100")
    reached = Shares(*[1.0] * len(dataclasses.fields(Shares)))
    speeds = dict.fromkeys(("memory_bandwidth", "nvlink_bandwidth", "network_bandwidth"), 1e40)
    return dataclasses.replace(machine, shares=reached, latencies=Latencies(0, 0, 0), **speeds)
