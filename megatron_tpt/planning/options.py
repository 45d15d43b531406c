"""The options of tools/plan.py. Light to import: the help of a command line needs nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_tpt.config.fields import POSITIONAL, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class PlanOptions:
    """Which run to plan, and on what."""

    run: Annotated[Path, POSITIONAL]
    """The recipe of the run. Model, batch, sequence length, precision and optimizer are taken from it."""
    gpus: PositiveInt
    """GPUs of the run, in whole nodes or in a part of one."""
    program: Literal["pretrain", "finetune"] = "pretrain"
    """The program that runs the recipe."""
    set: list[str] = field(default_factory=list)
    """Fields of the recipe to change, as in --set training.global_batch_size=1024 training.fp8=tensorwise."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    """The kind of GPU. The constants are those of H100s: the times of others are less certain."""
    gpus_per_node: PositiveInt = 8
    """GPUs that NVLink connects."""
    network_gbit_per_s: PositiveFloat = 400.0
    """Of the network adapter that every GPU has, in one direction."""
    memory_share: Annotated[float, Gt(0), Le(1)] = 0.85
    """Of a GPU's memory that a layout may need. The rest is for what is not estimated: temporary buffers,
    fragmentation."""
    top: PositiveInt = 10
    """Layouts to list."""
    json: bool = False
    """Print one JSON object instead of tables."""
