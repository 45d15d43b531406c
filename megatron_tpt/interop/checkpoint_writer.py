"""Writes the weights of a whole model as a checkpoint to start from: one process, no training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tpt import platform
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory, free_space
from megatron_tpt.indexing.tokenizer import copy_tokenizer
from megatron_tpt.training.checkpoint_files import write_checksums
from megatron_tpt.units import GIB

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

Reader = Callable[[str, int | None], torch.Tensor]
"""A tensor by its key in Megatron Core's checkpoints and, for one that is in every layer, the number of the layer."""


class Source(NamedTuple):
    """A model whose weights a checkpoint gets."""

    model: ModelConfig
    read: Reader
    tokenizer: Path | None
    """A folder that has it."""
    files: dict[str, bytes]
    """Others of the checkpoint's files, by name."""
    notes: list[str]
    """What is not carried over, and what else a user should know."""


def sharded_tensors(model: ModelConfig, read: Reader) -> dict[str, ShardedTensor]:
    """All weights of a model as Megatron Core's checkpoints name and stack them."""
    state = {}
    for weight in model.weights():
        if weight.is_tied:
            continue
        layers: Sequence[int | None] = range(model.num_layers) if weight.part == "layer" else [None]
        for layer in layers:
            place = [] if layer is None else [(0, layer, model.num_layers)]
            state[f"{weight.key} {layer}"] = ShardedTensor.from_rank_offsets(
                weight.key, read(weight.key, layer).contiguous(), *place, prepend_axis_num=len(place)
            )
    return state


def write_checkpoint(
    output: Path,
    model: ModelConfig,
    tensors: Mapping[str, ShardedTensor],
    tokenizer: Path | None,
    files: Mapping[str, bytes],
) -> None:
    """Write the weights, recipe.yaml with the model's shape, tokenizer/ and `files`; all of it or nothing. Raises
    UserError when there is no room."""
    with atomic_directory(output) as folder, platform.process_groups(ParallelConfig()):
        _save(dict(tensors), folder, output)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder / "tokenizer")
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": to_dict(model)}, sort_keys=False))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        write_checksums(folder)


def _save(tensors: dict[str, ShardedTensor], folder: Path, output: Path) -> None:
    try:
        dist_checkpointing.save(tensors, str(folder))
    except CheckpointException as error:  # a separate process wrote, and reports no error number
        reason = " ".join(str(error).split())[-300:]
        free = free_space(folder)[1] / GIB
        raise UserError(
            f"{output}: could not be written ({reason}): make room, {free:.1f} GiB are free there"
        ) from error
