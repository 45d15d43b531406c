"""Loading checkpoints (checkpoint_saving.py) under any parallel layout."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.platform.megatron_core import copy_main_weights_to_model
from megatron_tpt.training import fsdp_checkpoint
from megatron_tpt.training.checkpoint_files import find_damage
from megatron_tpt.training.checkpoint_state import (
    fp8_statistics,
    give_each_parameter_its_step,
    group_of_copies,
    holders_of_groups,
    layout,
    make_torch_adam_loadable,
    members,
    optimizer_format,
    pieces_of,
    set_fp8_statistics,
    set_groups,
    set_random_state,
    set_weights,
    sharded_random_state,
    weights_of,
    weights_state,
)
from megatron_tpt.training.checkpoint_trust import not_a_checkpoint, objects_as_data, require_data_only

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_tensors_metadata
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

logger = logging.getLogger(__name__)


@torch.no_grad()
def _round_weights_from_main(optimizer: MegatronOptimizer) -> None:
    """Set FP8 weights from the optimizer's main weights, as after a step: those just loaded were rounded with outdated
    scales."""
    for member in members(optimizer):
        if isinstance(member, DistributedOptimizer) and member.ddp_config.fp8_param_gather:
            copy_main_weights_to_model(member)
            for chunk in member.model_chunks:
                chunk.start_param_sync(force_sync=True)


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Those of a sharded state dict, at any depth."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def _require_fit(state: dict[str, Any], folder: Path) -> None:
    """Raises UserError on all ranks when the checkpoint lacks a tensor that one of them needs, or has it in another
    shape: during loading, that rank would fail alone."""
    known = load_tensors_metadata(str(folder))
    wrong = next(
        (
            f"{tensor.key} is {tuple(known[tensor.key].global_shape) if tensor.key in known else 'not'} there, "
            f"{tuple(tensor.global_shape)} here"
            for tensor in sharded_tensors(state)
            if tensor.key not in known
            or not (tensor.allow_shape_mismatch or tensor.global_shape == known[tensor.key].global_shape)
        ),
        None,
    )
    every = platform.gather_objects(wrong)
    if any(every):
        raise UserError(
            f"the tensors in {folder} do not fit the model of this recipe (compare it with the recipe.yaml there): "
            f"{next(filter(None, every))}"
        )


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict: data that several ranks need is read in shares and exchanged."""
    _require_fit(state, folder)
    # Streaming would leave values in `state` that are rounded to the model's FP8 tensors.
    strategy = TorchDistLoadShardedStrategy(stream_ckpt_dequant=False)
    with objects_as_data(folder):
        return dist_checkpointing.load(
            state, str(folder), FullyParallelLoadStrategyWrapper(strategy, group_of_copies())
        )


def _require_checkpoint(folder: Path) -> None:
    require_data_only(folder)
    try:
        is_checkpoint = dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (AttributeError, RecursionError, TypeError, ValueError) as error:  # a foreign file may be anything
        raise UserError(f"{folder} is damaged (metadata.json: {one_line(error)}): give another checkpoint") from error
    if not is_checkpoint:
        raise not_a_checkpoint(folder)


def load_weights(
    folder: Path, model: GPTModel | Sequence[GPTModel], *, is_wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Load only the weights, whatever layout wrote them; only those whose name in the model `is_wanted`.

    Raises UserError when the folder is no checkpoint or when its model has another shape.
    """
    _require_checkpoint(folder)
    if damage := find_damage(folder):
        raise UserError(f"{folder} is damaged ({'; '.join(damage[:4])}): give another checkpoint")
    wanted = {
        piece: {name: value for name, value in entries.items() if is_wanted(name)}
        for piece, entries in weights_state(model).items()
    }
    set_weights(model, _load({"model": wanted}, folder)["model"])


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, without weights. Needs no process group. Raises UserError when the folder is
    no checkpoint."""
    _require_checkpoint(folder)
    with warnings.catch_warnings(), objects_as_data(folder):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        return load_common_state_dict(str(folder))["trainer"]


def load_checkpoint(folder: Path, model: GPTModel | Sequence[GPTModel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Load everything a run needs to resume, under any layout. Returns the trainer state that was saved.

    The random state is restored if layout and device type are the same; otherwise it stays as seeded, which only
    affects dropout. So are the scales of delayed scaling in FP8; a line in the log says where they are not.
    """
    trainer_state = read_trainer_state(folder)
    sharding = trainer_state.get("optimizer_sharding", "fully_reshardable")
    (first, *_), state = pieces_of(model), dict[str, Any]()
    weights = weights_of(first)  # makes Megatron FSDP expose its shards, which it hides during a forward pass
    under_fsdp = fsdp_checkpoint.is_sharded(first)
    if under_fsdp:
        (own,) = members(optimizer)
        state["optimizer"] = fsdp_checkpoint.optimizer_state(first, weights, own, is_loading=True)
    else:
        make_torch_adam_loadable(optimizer)
        state["model"] = weights_state(model)
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=True, metadata=optimizer_format(sharding)
        )
        for holder in list(holders_of_groups(state["optimizer"])):
            del holder["param_groups"]  # Megatron Core merges them with the checkpoint's, which may differ in number
    same_layout = trainer_state["layout"] == layout()
    if same_layout:
        state["random_state"] = sharded_random_state()
    if statistics := fp8_statistics(model):
        if same_layout and trainer_state.get("has_fp8_scales"):
            state["fp8_statistics"] = statistics
        elif {"has_fp8_scales", "has_fp8_statistics"} & trainer_state.keys():
            origin = "another layout" if "has_fp8_scales" in trainer_state else "an earlier version, as a pickle"
            logger.warning(f"{folder}: its FP8 scales are of {origin}: delayed scaling begins anew, as in a new run")
    loaded = _load(state, folder)
    if under_fsdp:
        fsdp_checkpoint.set_optimizer_state(first, own, loaded["optimizer"])
    else:
        set_weights(model, loaded["model"])
        set_groups(loaded["optimizer"], optimizer)
        with torch.no_grad():  # Megatron Core leaves this to the caller when loading dp_reshardable
            optimizer.load_state_dict(loaded["optimizer"])
        give_each_parameter_its_step(optimizer)
    if same_layout:
        set_random_state(loaded["random_state"])
    if "fp8_statistics" in loaded:
        set_fp8_statistics(model, loaded["fp8_statistics"])
    _round_weights_from_main(optimizer)
    return trainer_state
