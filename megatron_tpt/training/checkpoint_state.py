"""What is in a checkpoint: weights, optimizer and random state, as Megatron Core's sharded tensors and objects."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.models.precision import scaling_statistics, set_scaling_statistics, unrounded_values
from megatron_tpt.platform.megatron_core import load_without_step
from megatron_tpt.training import fsdp_checkpoint

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_EXTRA_STATE = "_extra_state"


def weights_state(model: GPTModel | Sequence[GPTModel]) -> dict[str, dict[str, Any]]:
    """The weights of each model chunk as sharded tensors, without the `_extra_state` entries (FP8 statistics of
    Transformer Engine, empty otherwise)."""
    pieces = {f"piece_{i}": (gpt, weights_of(gpt)) for i, gpt in enumerate(pieces_of(model))}
    return {
        name: fsdp_checkpoint.whole_weights(entries, gpt) if fsdp_checkpoint.is_sharded(gpt) else entries
        for name, (gpt, entries) in pieces.items()
    }


def weights_of(gpt: GPTModel) -> dict[str, Any]:
    """The weights of one model chunk, as this rank holds them."""
    return {key: value for key, value in gpt.sharded_state_dict().items() if not key.endswith(_EXTRA_STATE)}


def pieces_of(model: GPTModel | Sequence[GPTModel]) -> Sequence[GPTModel]:
    """The chunks of a model, as a sequence also if there is only one."""
    return [model] if isinstance(model, GPTModel) else model


def set_weights(model: GPTModel | Sequence[GPTModel], state: dict[str, dict[str, Any]]) -> None:
    """Set the weights of the model to those loaded into its `weights_state`."""
    for i, gpt in enumerate(pieces_of(model)):
        gpt.load_state_dict(state[f"piece_{i}"], strict=False)
        for name, value in unrounded_values(gpt).items():
            value.copy_(state[f"piece_{i}"][name])


def fp8_statistics(model: GPTModel | Sequence[GPTModel]) -> dict[str, dict[str, ShardedObject]]:
    """The scales and amax histories of delayed scaling, by model chunk and module; empty under other FP8 recipes.

    Each rank has its own: it is loaded if the layout is the same, and starts empty otherwise. It is stored in place of
    Transformer Engine's `_extra_state`, which holds the same as a pickle.
    """
    return {
        f"piece_{i}": {
            name: dataclasses.replace(
                entry,
                key=entry.key.replace(_EXTRA_STATE, "fp8_statistics"),
                data=scaling_statistics(gpt.get_submodule(name)),
            )
            for key, entry in gpt.sharded_state_dict().items()
            if (name := key.removesuffix(f".{_EXTRA_STATE}")) != key
        }
        for i, gpt in enumerate(pieces_of(model))
        if gpt.config.fp8 and gpt.config.fp8_recipe == "delayed"
    }


def set_fp8_statistics(
    model: GPTModel | Sequence[GPTModel], state: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> None:
    """Have a model continue with what was loaded into `fp8_statistics`."""
    for i, gpt in enumerate(pieces_of(model)):
        for name, statistics in state[f"piece_{i}"].items():
            set_scaling_statistics(gpt.get_submodule(name), statistics, gpt.config)


def optimizer_format(sharding: str) -> dict[str, str]:
    """Megatron Core's setting for checkpoint.optimizer_sharding. Its default cannot be saved."""
    return {"distrib_optim_sharding_type": sharding}


def layout() -> list[Any]:
    """What must be unchanged for every rank to find its own random state and statistics."""
    return [
        platform.device().type,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    ]


def random_state() -> dict[str, Any]:
    """The states of this rank's random streams, for `set_random_state`."""
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def sharded_random_state() -> ShardedObject:
    """This rank's random state, at its place in the layout."""
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    _, *sizes = layout()
    return ShardedObject("random_state", random_state(), tuple(sizes), place)


def set_random_state(state: dict[str, Any]) -> None:
    """Continue this rank's random streams from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside, each with its own state; Muon's may be chained themselves."""
    inner = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if inner is None else [member for one in inner for member in members(one)]


def _with_torch_adam(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The members that use torch's AdamW: without Transformer Engine and apex all but Muon's, otherwise none."""
    return [member for member in members(optimizer) if isinstance(member.optimizer, torch.optim.AdamW)]


def make_torch_adam_loadable(optimizer: MegatronOptimizer) -> None:
    """Make Megatron Core load a state into torch's AdamW.

    Megatron Core keeps the number of steps in the parameter groups, torch's AdamW keeps it as a tensor in the state of
    every parameter. Loading would read this tensor, which does not exist before the first step, and would look for it
    in the checkpoint."""
    for member in _with_torch_adam(optimizer):
        for parameter in (parameter for group in member.optimizer.param_groups for parameter in group["params"]):
            member.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if isinstance(member, DistributedOptimizer):
            load_without_step(member)


def give_each_parameter_its_step(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own `step` tensor: Megatron Core loads one for all of them, which torch's AdamW would
    increment in place once per parameter."""
    for member in _with_torch_adam(optimizer):
        for state in member.optimizer.state.values():
            state["step"] = state["step"].clone()


def holders_of_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The mappings in an optimizer's state that hold parameter groups: one for each of its members, in their order."""
    if isinstance(state, dict):
        if "param_groups" in state:
            yield state
        else:
            for value in state.values():
                yield from holders_of_groups(value)


def set_groups(loaded: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Replace the parameter groups of a checkpoint by the optimizer's own: learning rates, weight decay, betas and so
    on come from the recipe, only the number of updates from the checkpoint. Megatron Core matches groups by learning
    rate and weight decay, and finds no match if these were changed."""
    for holder, member in zip(list(holders_of_groups(loaded)), members(optimizer), strict=True):
        steps = [group["step"] for group in holder["param_groups"] if "step" in group]
        updates = {"step": steps[0]} if steps else {}
        holder["param_groups"] = [{**group, **updates} for group in member.optimizer.state_dict()["param_groups"]]


def group_of_copies() -> torch.distributed.ProcessGroup:
    """The ranks that hold the same weights and share the work of writing and reading them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
