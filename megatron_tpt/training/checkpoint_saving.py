"""Saving checkpoints: Megatron Core's distributed format, which any parallel layout loads.

    RUN/checkpoints/step_00001000/   weights, optimizer, random state, trainer state; recipe.yaml; the files of the
                                     model (model_files.py); checksums.json
    RUN/checkpoints/latest           link to the newest (checkpoint_files.py)

A folder is written under a temporary name and renamed when whole, so a folder with the final name is always complete,
whatever was killed when. Later damage is detected by the checksums (checkpoint_files.py). A checkpoint that
cannot be written (a full disk) raises SaveError on all ranks, and leaves the ones before as they were.

The writing can continue in the background (`CheckpointSaving.write_in_background`), in a forked process: Megatron
Core's persistent worker asks for a CUDA device by its rank, and waiting for one that has died never ends.
"""

import contextlib
import errno
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.files import sync_tree
from megatron_tpt.indexing.tokenizer import read_tokenizer_files
from megatron_tpt.platform.background import BackgroundWork
from megatron_tpt.platform.megatron_core import (
    before_finalizing,
    replace_results_queue,
)
from megatron_tpt.training import fsdp_checkpoint
from megatron_tpt.training.checkpoint_files import CHECKSUMS, describe_files, point_latest
from megatron_tpt.training.checkpoint_state import (
    fp8_statistics,
    group_of_copies,
    layout,
    members,
    optimizer_format,
    pieces_of,
    sharded_random_state,
    weights_state,
)
from megatron_tpt.training.phases import phase

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer

replace_results_queue()

# What a rank wrote: Megatron Core's account of it (None when it had nothing to write), size and checksum by file.
_Written = tuple[Any, dict[str, list[Any]]]


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are as they were. All ranks raise it together."""


def _together(folder: Path, action: Callable[[], Any]) -> Any:
    """Do something on every rank. Raises SaveError on all of them when any met an OSError or a UserError: a rank that
    continued alone would wait for the others forever."""
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
    """Megatron Core's, which lets the first rank fail alone while it writes the index of what all ranks wrote, while
    the

       others wait: here the failure is kept and raised on all of them."""

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

    @phase("checkpoint")
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
        """Abandon the checkpoint; the next save removes what was written of it. A rank may call it alone."""
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
    """A new folder next to `folder`, the same on all ranks; what killed runs left there is removed.

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


@phase("checkpoint")
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
    format_of_optimizer = optimizer_format(optimizer_sharding)
    state: dict[str, Any] = {"model": weights_state(model), "trainer": {**trainer_state, "layout": layout()}}
    if optimizer is not None:
        state["trainer"]["optimizer_sharding"] = optimizer_sharding
        (first, *_), weights = pieces_of(model), state["model"]
        if fsdp_checkpoint.is_sharded(first):
            (own,) = members(optimizer)
            state["optimizer"] = fsdp_checkpoint.optimizer_state(first, weights["piece_0"], own, is_loading=False)
        else:
            state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=format_of_optimizer)
        state["random_state"] = sharded_random_state()
        if statistics := fp8_statistics(model):
            state["trainer"]["has_fp8_scales"] = True
            state["fp8_statistics"] = statistics

    def write_small_files() -> None:
        if platform.is_first_rank():
            (temporary / "recipe.yaml").write_text(recipe_yaml)
            for name, content in model_files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)

    strategy = _SaveStrategy()
    # Copies of one tensor are shared among the ranks that hold one; under FSDP only the first has it (_put_together).
    is_sharded = fsdp_checkpoint.is_sharded(pieces_of(model)[0])
    request = dist_checkpointing.save(
        state,
        str(temporary),
        strategy if is_sharded else FullyParallelSaveStrategyWrapper(strategy, group_of_copies()),
        async_sharded_save=True,
        async_strategy="mcore",
        content_metadata=format_of_optimizer,
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
    """Write a checkpoint whole or not at all, and point `latest` next to it at it. All ranks call it.

    Without an optimizer it holds weights only, to start other runs from. Raises SaveError on all ranks.
    """
    tokenizer = read_tokenizer_files(tokenizer_path) if tokenizer_path else {}
    files = {f"tokenizer/{name}": content for name, content in tokenizer.items()}
    start_saving(folder, model, optimizer, trainer_state, recipe_yaml=recipe_yaml, model_files=files).finish()
