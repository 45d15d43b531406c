"""Checkpoints: Megatron Core's distributed format, which any parallel layout loads.

    RUN/checkpoints/step_00001000/   weights, optimizer, random state, trainer state; recipe.yaml; tokenizer/
    RUN/checkpoints/latest           link to the newest

A folder is written under a temporary name and renamed when whole, so a folder with the final name is always complete,
whatever was killed when. Loading takes the newest of them.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_symlink, sync_tree
from megatron_tpt.indexing.tokenizer import copy_tokenizer

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

# Optimizer state that loads under any data-parallel size; Megatron Core's default format does not save at all.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir())


def weights_state(model: GPTModel) -> dict[str, Any]:
    """The model's weights as sharded tensors, without the `_extra_state` entries, in which Transformer Engine keeps
    FP8 statistics and everything else nothing."""
    return {key: value for key, value in model.sharded_state_dict().items() if not key.endswith("_extra_state")}


def _layout() -> list[int]:
    return [
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    ]


def _random_state() -> ShardedObject:
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return ShardedObject("random_state", state, tuple(_layout()), place)


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _with_torch_adam(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside that use torch's AdamW: all in a run without Transformer Engine and apex, else none."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if isinstance(member.optimizer, torch.optim.AdamW)]


def _make_torch_adam_loadable(optimizer: MegatronOptimizer) -> None:
    """Megatron Core keeps the number of steps in the parameter groups, torch's AdamW as a tensor in every parameter's
    state. Loading trips over that twice: it reads the tensor, which is not there before the first step
    (distrib_optimizer.py:838, optimizer.py:539), and it looks for it in the checkpoint (distrib_optimizer.py:1223)."""
    for member in _with_torch_adam(optimizer):
        for parameter in (parameter for group in member.optimizer.param_groups for parameter in group["params"]):
            member.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if isinstance(member, DistributedOptimizer):
            copy_into_state = member._set_main_param_and_optimizer_states
            member._set_main_param_and_optimizer_states = lambda parameter, tensors, copy=copy_into_state: copy(
                parameter, {**tensors, "step": None}
            )


def _give_each_parameter_its_step(optimizer: MegatronOptimizer) -> None:
    """Megatron Core loads one `step` tensor for all parameters (distrib_optimizer.py:1028); torch's AdamW adds 1 to it
    in place for each of them."""
    for member in _with_torch_adam(optimizer):
        for state in member.optimizer.state.values():
            state["step"] = state["step"].clone()


def save_checkpoint(
    folder: Path,
    model: GPTModel,
    optimizer: MegatronOptimizer | None,
    trainer_state: dict[str, Any],
    *,
    recipe_yaml: str,
    tokenizer_path: Path,
) -> None:
    """Write a checkpoint whole or not at all, and point `latest` beside it at it. All ranks call it.

    Without an optimizer it holds weights only, to start other runs from.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    if platform.is_first_rank():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    state: dict[str, Any] = {"model": weights_state(model), "trainer": {**trainer_state, "layout": _layout()}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=OPTIMIZER_FORMAT)
        state["random_state"] = _random_state()
    dist_checkpointing.save(state, str(temporary), content_metadata=OPTIMIZER_FORMAT)
    if platform.is_first_rank():
        (temporary / "recipe.yaml").write_text(recipe_yaml)
        copy_tokenizer(tokenizer_path, temporary / "tokenizer")
        sync_tree(temporary)
        temporary.rename(folder)
        atomic_symlink(folder.name, folder.parent / "latest")
    torch.distributed.barrier()


def _require_checkpoint(folder: Path) -> None:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise UserError(f"{folder} is no checkpoint: give a folder like RUN/checkpoints/latest")


def load_weights(folder: Path, model: GPTModel) -> None:
    """Load weights and nothing else, whatever layout wrote them.

    Raises UserError when the folder is no checkpoint or when its model has another shape.
    """
    _require_checkpoint(folder)
    try:
        state = dist_checkpointing.load({"model": weights_state(model)}, str(folder))
    except Exception as error:  # Megatron Core and torch raise various ones for shapes and keys that do not fit
        raise UserError(
            f"the weights in {folder} do not fit the model of this recipe (compare it with the recipe.yaml there): "
            + " ".join(str(error).split())[:400]
        ) from error
    model.load_state_dict(state["model"], strict=False)


def load_checkpoint(folder: Path, model: GPTModel, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Load everything a run needs to go on, under any layout. Returns the trainer state that was saved.

    The random state is that of the same rank when the layout is the same; otherwise it stays as it was seeded, which
    only dropout notices.
    """
    _require_checkpoint(folder)
    trainer_state = load_common_state_dict(str(folder))["trainer"]
    _make_torch_adam_loadable(optimizer)
    weights = weights_state(model)
    state: dict[str, Any] = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=OPTIMIZER_FORMAT),
    }
    same_layout = trainer_state["layout"] == _layout()
    if same_layout:
        state["random_state"] = _random_state()
    loaded = dist_checkpointing.load(state, str(folder))
    model.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    _give_each_parameter_its_step(optimizer)
    if same_layout:
        _set_random_state(loaded["random_state"])
    return trainer_state


def delete_old_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints. The first rank calls it."""
    for folder in finished_checkpoints(checkpoints)[:-keep_last]:
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        folder.rename(doomed)  # in one step, so that no half-deleted folder looks complete
        shutil.rmtree(doomed)
