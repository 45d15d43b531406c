"""Checkpoints: Megatron Core's distributed format, which any parallel layout loads.

    RUN/checkpoints/step_00001000/   weights, optimizer, random state, trainer state; recipe.yaml; the files of the
                                     model (model_files.py); checksums.json
    RUN/checkpoints/latest           link to the newest (checkpoint_files.py)

A folder is written under a temporary name and renamed when whole, so a folder with the final name is always complete,
whatever was killed when. What was damaged since is told by the checksums (checkpoint_files.py). A checkpoint that
cannot be written (a full disk) raises SaveError on all ranks, and leaves the ones before as they were.

The writing can go on in the background (`CheckpointSaving.write_in_background`), in a forked process: Megatron Core's
persistent worker asks for a CUDA device by its rank, and is waited for for ever when it has died.
"""

import contextlib
import errno
import json
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.files import sync_tree
from megatron_tpt.indexing.tokenizer import read_tokenizer_files
from megatron_tpt.models.precision import unrounded_values
from megatron_tpt.platform.background import BackgroundWork
from megatron_tpt.platform.megatron_core import (
    before_finalizing,
    copy_main_weights_to_model,
    load_without_step,
    replace_results_queue,
)
from megatron_tpt.training import fsdp_checkpoint
from megatron_tpt.training.checkpoint_files import CHECKSUMS, describe_files, find_damage, point_latest
from megatron_tpt.training.checkpoint_trust import objects_as_data, require_data_only

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_tensors_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

replace_results_queue()

# What a rank wrote: Megatron Core's account of it (None when it had nothing to write), size and checksum by file.
_Written = tuple[Any, dict[str, list[Any]]]


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are as they were. All ranks raise it together."""


def weights_state(model: GPTModel | Sequence[GPTModel]) -> dict[str, dict[str, Any]]:
    """The weights of each piece of the model as sharded tensors, without the `_extra_state` entries, in which
    Transformer Engine keeps FP8 statistics and everything else nothing."""
    pieces = {f"piece_{i}": (gpt, _entries(gpt)) for i, gpt in enumerate(_pieces(model))}
    return {
        name: fsdp_checkpoint.whole_weights(entries, gpt) if fsdp_checkpoint.is_sharded(gpt) else entries
        for name, (gpt, entries) in pieces.items()
    }


def _entries(gpt: GPTModel) -> dict[str, Any]:
    return {key: value for key, value in gpt.sharded_state_dict().items() if not key.endswith("_extra_state")}


def _pieces(model: GPTModel | Sequence[GPTModel]) -> Sequence[GPTModel]:
    return [model] if isinstance(model, GPTModel) else model


def _set_weights(model: GPTModel | Sequence[GPTModel], state: dict[str, dict[str, Any]]) -> None:
    for i, gpt in enumerate(_pieces(model)):
        gpt.load_state_dict(state[f"piece_{i}"], strict=False)
        for name, value in unrounded_values(gpt).items():
            value.copy_(state[f"piece_{i}"][name])


def _fp8_statistics(model: GPTModel | Sequence[GPTModel]) -> dict[str, dict[str, Any]]:
    """What delayed scaling remembers of the largest values of the last steps, by piece; nothing under other recipes.

    Each rank has its own: they are loaded where the layout is the same, and begin anew elsewhere.
    """
    return {
        f"piece_{i}": {key: value for key, value in gpt.sharded_state_dict().items() if key.endswith("_extra_state")}
        for i, gpt in enumerate(_pieces(model))
        if gpt.config.fp8 and gpt.config.fp8_recipe == "delayed"
    }


def _optimizer_format(sharding: str) -> dict[str, str]:
    """Megatron Core's name for checkpoint.optimizer_sharding. What it takes without one does not save at all."""
    return {"distrib_optim_sharding_type": sharding}


def _layout() -> list[Any]:
    """What must be the same for every rank to find its own random state and statistics."""
    return [
        platform.device().type,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    ]


def random_state() -> dict[str, Any]:
    """The states of this rank's random streams, which `set_random_state` takes."""
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _sharded_random_state() -> ShardedObject:
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    _, *sizes = _layout()
    return ShardedObject("random_state", random_state(), tuple(sizes), place)


def set_random_state(state: dict[str, Any]) -> None:
    """Have this rank's random streams go on from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside, each with a state of its own; Muon's may be chained themselves."""
    inner = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if inner is None else [member for one in inner for member in members(one)]


def _with_torch_adam(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those that use torch's AdamW: all but Muon's in a run without Transformer Engine and apex, else none."""
    return [member for member in members(optimizer) if isinstance(member.optimizer, torch.optim.AdamW)]


def _make_torch_adam_loadable(optimizer: MegatronOptimizer) -> None:
    """Megatron Core keeps the number of steps in the parameter groups, torch's AdamW as a tensor in every
    parameter's state. Loading trips over that twice: it reads the tensor, which is not there before the first step,
    and it looks for it in the checkpoint."""
    for member in _with_torch_adam(optimizer):
        for parameter in (parameter for group in member.optimizer.param_groups for parameter in group["params"]):
            member.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if isinstance(member, DistributedOptimizer):
            load_without_step(member)


def _give_each_parameter_its_step(optimizer: MegatronOptimizer) -> None:
    """Megatron Core loads one `step` tensor for all parameters; torch's AdamW adds 1 to it
    in place for each of them."""
    for member in _with_torch_adam(optimizer):
        for state in member.optimizer.state.values():
            state["step"] = state["step"].clone()


def _holders_of_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The mappings in an optimizer's state that hold parameter groups: one for each of its members, in their order."""
    if isinstance(state, dict):
        if "param_groups" in state:
            yield state
        else:
            for value in state.values():
                yield from _holders_of_groups(value)


def _set_groups(loaded: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Replace the parameter groups of a checkpoint by the optimizer's own: rates, decays, betas and the like are the
    recipe's, and only the number of updates is the checkpoint's. Megatron Core pairs groups by their rates and decays,
    and finds no counterpart for those that were changed."""
    for holder, member in zip(list(_holders_of_groups(loaded)), members(optimizer), strict=True):
        steps = [group["step"] for group in holder["param_groups"] if "step" in group]
        updates = {"step": steps[0]} if steps else {}
        holder["param_groups"] = [{**group, **updates} for group in member.optimizer.state_dict()["param_groups"]]


def _together(folder: Path, action: Callable[[], Any]) -> Any:
    """Do something on every rank. Raises SaveError on all of them when any met an OSError or a UserError: a rank that
    went on alone would wait for the others for ever."""
    result, error = None, None
    try:
        result = action()
    except (OSError, UserError) as caught:
        error = f"(rank {torch.distributed.get_rank()}: {' '.join(str(caught).split())[:300]})"
        if isinstance(caught, OSError):
            has_room = caught.errno not in (None, errno.ENOSPC, errno.EDQUOT)  # None: Megatron Core does not say
            advice = "make the folder writable" if has_room else "make room"
            error += f": {advice}, {_free_bytes(folder) / 2**30:.1f} GiB are free there"
    errors = platform.gather_objects(error)
    if any(errors):
        raise SaveError(f"the checkpoint {folder} could not be written {next(filter(None, errors))}")
    return result


def _free_bytes(folder: Path) -> int:
    place = next(path for path in (folder.parent, *folder.parent.parents) if path.exists())
    return shutil.disk_usage(place).free


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron Core's, which lets the first rank fail alone while it writes the index of what all ranks wrote, with the
    others waiting for it: here the failure is kept, for all to hear of."""

    failure: OSError | None = None

    def __init__(self) -> None:
        super().__init__()
        before_finalizing(self, self._keep_failure)

    def _keep_failure(self, writer: Any) -> None:
        finish = writer.finish

        def finish_and_keep_failure(*arguments: Any) -> None:
            try:
                finish(*arguments)
            except OSError as error:
                self.failure = error

        writer.finish = finish_and_keep_failure

    def raise_failure(self) -> None:
        """Raise what was kept, if anything."""
        if self.failure is not None:
            raise self.failure


class CheckpointSaving:
    """A checkpoint that `start_saving` has laid out: it exists once `finish` has returned. All ranks call every method.

    `request` is Megatron Core's description of what this rank writes: a function, and its arguments.
    """

    def __init__(self, folder: Path, temporary: Path, request: AsyncRequest, strategy: _SaveStrategy) -> None:
        self.folder, self.temporary = folder, temporary
        self.request, self.strategy = request, strategy
        self._background: BackgroundWork[_Written] | None = None

    def write_in_background(self) -> None:
        """Begin to write the weights and states of this moment; they may change when this has returned. Raises
        SaveError on all ranks."""
        staged = self._stage()
        with self._removed_on_failure():
            self._background = _together(self.folder, lambda: BackgroundWork(lambda: self._write(staged)))

    def is_written(self) -> bool:
        """Whether `finish` has nothing to wait for on any rank, be it that the writing failed."""
        over = torch.tensor(int(self._background is None or self._background.is_over), device=platform.device())
        torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MIN)
        return bool(over.item())

    def finish(self) -> None:
        """Write, or wait until it is written; check what all ranks wrote, give it its name, and point `latest` at it.
        Raises SaveError on all ranks."""
        write = self._background.result if self._background is not None else lambda: self._write(self._stage())
        with self._removed_on_failure():
            result, own = _together(self.folder, write)
            if result is not None:
                self.request.async_fn_args[2].put(result)
            self.request.finalize_fns[0]()  # gathers what was written where; the others are in _name_files
            _together(self.folder, self.strategy.raise_failure)
            described = platform.gather_objects(own)
            _together(self.folder, lambda: self._name_files(described) if platform.is_first_rank() else None)

    def abandon(self) -> None:
        """Give the checkpoint up; the next one that is saved removes what is there of it. A rank may do so alone."""
        if self._background is not None:
            self._background.kill()

    def _stage(self) -> list[Any]:
        """What this rank writes, in this machine's memory: files as Megatron Core's writer takes them."""
        return self.request.preload_fn() if self.request.preload_fn is not None else []

    def _write(self, staged: list[Any]) -> _Written:
        if self.request.async_fn is None:
            return None, {}
        rank, _, results = self.request.async_fn_args
        self.request.async_fn(rank, staged, results, **self.request.async_fn_kwargs)
        result = results.get()
        if isinstance(result, Exception):
            raise OSError(str(result)) from result
        return result, describe_files(self.temporary, [name for _, name, _ in staged])

    @contextlib.contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except SaveError:
            if platform.is_first_rank():
                shutil.rmtree(self.temporary, ignore_errors=True)
            torch.distributed.barrier()
            raise

    def _name_files(self, described: list[dict[str, list[Any]]]) -> None:
        save_config(CheckpointingConfig(self.strategy.backend, self.strategy.version), str(self.temporary))
        files = {name: description for one in described for name, description in one.items()}
        others = [path for path in self.temporary.rglob("*") if path.is_file()]
        names = [str(path.relative_to(self.temporary)) for path in others]
        files |= describe_files(self.temporary, [name for name in names if name not in files])
        (self.temporary / CHECKSUMS).write_text(json.dumps(files, indent=1, sort_keys=True))
        sync_tree(self.temporary)
        self.temporary.rename(self.folder)
        point_latest(self.folder)


def _make_temporary(folder: Path) -> Path:
    """A new folder beside `folder`, the same on all ranks; what killed runs left there is removed.

    Its name is new every time: a process that writes in the background may outlive the run that started it.
    """
    name = [f".tmp-{folder.name}-{secrets.token_hex(4)}"]
    torch.distributed.broadcast_object_list(name)
    temporary = folder.with_name(name[0])

    def make() -> None:
        if platform.is_first_rank():
            for old in folder.parent.glob(".tmp-*"):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old, ignore_errors=True)
                else:  # what a killed run was about to make `latest`
                    old.unlink(missing_ok=True)
            temporary.mkdir(parents=True)

    _together(folder, make)
    return temporary


def start_saving(
    folder: Path,
    model: GPTModel | Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    trainer_state: dict[str, Any],
    *,
    recipe_yaml: str,
    model_files: Mapping[str, bytes],
    optimizer_sharding: str = "fully_reshardable",
) -> CheckpointSaving:
    """Lay out a checkpoint; weights and states are then written as the caller chooses. All ranks call it.

    Without an optimizer it holds weights only, to start other runs from. `model_files` are written as they are, by
    their names in the folder. Raises SaveError on all ranks.
    """
    temporary = _make_temporary(folder)
    optimizer_format = _optimizer_format(optimizer_sharding)
    state: dict[str, Any] = {"model": weights_state(model), "trainer": {**trainer_state, "layout": _layout()}}
    if optimizer is not None:
        state["trainer"]["optimizer_sharding"] = optimizer_sharding
        (first, *_), weights = _pieces(model), state["model"]
        if fsdp_checkpoint.is_sharded(first):
            (own,) = members(optimizer)
            state["optimizer"] = fsdp_checkpoint.optimizer_state(first, weights["piece_0"], own, is_loading=False)
        else:
            state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=optimizer_format)
        state["random_state"] = _sharded_random_state()
        if statistics := _fp8_statistics(model):
            state["trainer"]["has_fp8_statistics"] = True
            state["fp8_statistics"] = statistics

    def write_small_files() -> None:
        if platform.is_first_rank():
            (temporary / "recipe.yaml").write_text(recipe_yaml)
            for name, content in model_files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)

    strategy = _SaveStrategy()
    # Copies of one tensor are shared among the ranks that hold one; under FSDP only the first has it (_put_together).
    is_sharded = fsdp_checkpoint.is_sharded(_pieces(model)[0])
    request = dist_checkpointing.save(
        state,
        str(temporary),
        strategy if is_sharded else FullyParallelSaveStrategyWrapper(strategy, _group_of_copies()),
        async_sharded_save=True,
        async_strategy="mcore",
        content_metadata=optimizer_format,
    )
    _together(folder, write_small_files)
    return CheckpointSaving(folder, temporary, request, strategy)


def save_checkpoint(
    folder: Path,
    model: GPTModel | Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    trainer_state: dict[str, Any],
    *,
    recipe_yaml: str,
    tokenizer_path: Path | None,
) -> None:
    """Write a checkpoint whole or not at all, and point `latest` beside it at it. All ranks call it.

    Without an optimizer it holds weights only, to start other runs from. Raises SaveError on all ranks.
    """
    tokenizer = read_tokenizer_files(tokenizer_path) if tokenizer_path else {}
    files = {f"tokenizer/{name}": content for name, content in tokenizer.items()}
    start_saving(folder, model, optimizer, trainer_state, recipe_yaml=recipe_yaml, model_files=files).finish()


@torch.no_grad()
def _round_weights_anew(optimizer: MegatronOptimizer) -> None:
    """Set weights that are kept in FP8 from the optimizer's, as after a step: those just loaded were rounded with
    whatever scale each had before."""
    for member in members(optimizer):
        if isinstance(member, DistributedOptimizer) and member.ddp_config.fp8_param_gather:
            copy_main_weights_to_model(member)
            for chunk in member.model_chunks:
                chunk.start_param_sync(force_sync=True)


def _group_of_copies() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def _require_fit(state: dict[str, Any], folder: Path) -> None:
    """Raises UserError on all ranks when the checkpoint lacks a tensor that one of them asks for, or has it in another
    shape: in loading a rank alone would fail."""
    known = load_tensors_metadata(str(folder))
    wrong = next(
        (
            f"{tensor.key} is {tuple(known[tensor.key].global_shape) if tensor.key in known else 'not'} there, "
            f"{tuple(tensor.global_shape)} here"
            for tensor in _sharded_tensors(state)
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
    """Fill a sharded state dict: every rank reads a share of what several need, and hands it on."""
    _require_fit(state, folder)
    # Streaming would leave in `state` what the model's FP8 tensors make of it, rounded.
    strategy = TorchDistLoadShardedStrategy(stream_ckpt_dequant=False)
    with objects_as_data(folder):
        return dist_checkpointing.load(
            state, str(folder), FullyParallelLoadStrategyWrapper(strategy, _group_of_copies())
        )


def _require_checkpoint(folder: Path) -> None:
    require_data_only(folder)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise UserError(f"{folder} is not a checkpoint: give a folder like RUN/checkpoints/latest")


def load_weights(folder: Path, model: GPTModel | Sequence[GPTModel]) -> None:
    """Load weights and nothing else, whatever layout wrote them.

    Raises UserError when the folder is no checkpoint or when its model has another shape.
    """
    _require_checkpoint(folder)
    if damage := find_damage(folder):
        raise UserError(f"{folder} is damaged ({'; '.join(damage[:4])}): give another checkpoint")
    _set_weights(model, _load({"model": weights_state(model)}, folder)["model"])


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, without weights. Needs no process group. Raises UserError when the folder is
    no checkpoint."""
    _require_checkpoint(folder)
    with warnings.catch_warnings(), objects_as_data(folder):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant
        return load_common_state_dict(str(folder))["trainer"]


def load_checkpoint(folder: Path, model: GPTModel | Sequence[GPTModel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Load everything a run needs to go on, under any layout. Returns the trainer state that was saved.

    The random state is that of the same rank when layout and kind of device are the same; otherwise it stays as it was
    seeded, which only dropout notices.
    """
    trainer_state = read_trainer_state(folder)
    sharding = trainer_state.get("optimizer_sharding", "fully_reshardable")
    (first, *_), state = _pieces(model), dict[str, Any]()
    under_fsdp = fsdp_checkpoint.is_sharded(first)
    if under_fsdp:
        (own,) = members(optimizer)
        state["optimizer"] = fsdp_checkpoint.optimizer_state(first, _entries(first), own, is_loading=True)
    else:
        _make_torch_adam_loadable(optimizer)
        state["model"] = weights_state(model)
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=True, metadata=_optimizer_format(sharding)
        )
        for holder in list(_holders_of_groups(state["optimizer"])):
            del holder["param_groups"]  # Megatron Core merges them with the checkpoint's, of which there may be others
    same_layout = trainer_state["layout"] == _layout()
    if same_layout:
        state["random_state"] = _sharded_random_state()
        if trainer_state.get("has_fp8_statistics"):
            state["fp8_statistics"] = _fp8_statistics(model)
    loaded = _load(state, folder)
    if under_fsdp:
        fsdp_checkpoint.set_optimizer_state(first, own, loaded["optimizer"])
    else:
        _set_weights(model, loaded["model"])
        _set_groups(loaded["optimizer"], optimizer)
        with torch.no_grad():  # Megatron Core's loading of dp_reshardable leaves it to the caller
            optimizer.load_state_dict(loaded["optimizer"])
        _give_each_parameter_its_step(optimizer)
    if same_layout:
        set_random_state(loaded["random_state"])
    for gpt, statistics in zip(_pieces(model), loaded.get("fp8_statistics", {}).values(), strict=False):
        gpt.load_state_dict(statistics, strict=False)
    _round_weights_anew(optimizer)
    return trainer_state
