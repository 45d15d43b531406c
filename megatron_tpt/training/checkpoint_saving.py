"""Saving checkpoints: Megatron Core's distributed format, which any parallel layout loads.

    RUN/checkpoints/step_00001000/   weights, optimizer, random state, trainer state; recipe.yaml; the files of the
                                     model (model_files.py); checksums.json
    RUN/checkpoints/latest           link to the newest (checkpoint_files.py)

A folder is written under a temporary name and renamed when complete, so a folder with the final name is always
complete, whenever a process was killed. Later damage is detected by the checksums (checkpoint_files.py). A checkpoint
that cannot be written (a full disk) raises SaveError on all ranks, and does not affect earlier ones.

Writing can continue in the background (`CheckpointSaving.write_in_background`), in a forked process: Megatron Core's
persistent worker requires a CUDA device, and waiting for one that has died would never end.
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
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.files import free_space, sync_tree
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
from megatron_tpt.units import GIB

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer

replace_results_queue()

# What a rank wrote: Megatron Core's result (None when it had nothing to write); size and checksum by file.
_Written = tuple[Any, dict[str, list[Any]]]


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are not affected. All ranks raise it together."""


def _together(folder: Path, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank. Raises SaveError on all of them if it raised an OSError or a UserError on any: a rank
    that continued would wait forever for those that did not."""
    result, error = None, None
    try:
        result = action()
    except (OSError, UserError) as caught:
        error = f"(rank {torch.distributed.get_rank()}: {one_line(caught)})"
        if isinstance(caught, OSError):
            has_room = caught.errno not in (None, errno.ENOSPC, errno.EDQUOT)  # None: Megatron Core does not say
            advice = "make the folder writable" if has_room else "make room"
            error += f": {advice}, {free_space(folder.parent)[1] / GIB:.1f} GiB are free there"
    errors = platform.gather_objects(error)
    if any(errors):
        raise SaveError(f"the checkpoint {folder} could not be written {next(filter(None, errors))}")
    return result


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron Core's strategy, whose first rank writes the index of all files while the other ranks wait: here its
    failure is kept, so that all ranks can raise it."""

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
        """Raise the failure that was kept, if any."""
        if self.failure is not None:
            raise self.failure


class CheckpointSaving:
    """A checkpoint that `start_saving` has prepared; it exists once `finish` has returned. All ranks call every method.

    `request` is Megatron Core's description of what this rank writes: a function, and its arguments.
    """

    def __init__(self, folder: Path, temporary: Path, request: AsyncRequest, strategy: _SaveStrategy) -> None:
        self.folder, self.temporary = folder, temporary
        self.request, self.strategy = request, strategy
        self._background: BackgroundWork[_Written] | None = None

    def write_in_background(self) -> None:
        """Start writing a snapshot of weights and states; they may change once this has returned. Raises SaveError on
        all ranks."""
        staged = self._stage()
        with self._removed_on_failure():
            self._background = _together(self.folder, lambda: BackgroundWork(lambda: self._write(staged)))

    def is_written(self) -> bool:
        """Whether writing has ended on all ranks, successfully or not, so that `finish` would not wait."""
        over = torch.tensor(int(self._background is None or self._background.is_over), device=platform.device())
        torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MIN)
        return bool(over.item())

    @phase("checkpoint")
    def finish(self) -> None:
        """Write, or wait for the background process; check what all ranks wrote, rename the folder, and point `latest`
        at it. Raises SaveError on all ranks."""
        write = self._background.result if self._background is not None else lambda: self._write(self._stage())
        with self._removed_on_failure():
            result, own = _together(self.folder, write)
            if result is not None:
                self.request.async_fn_args[2].put(result)
            self.request.finalize_fns[0]()  # writes the index; _name_files does what the other functions would
            _together(self.folder, self.strategy.raise_failure)
            described = platform.gather_objects(own)
            _together(self.folder, lambda: self._name_files(described) if platform.is_first_rank() else None)

    def abandon(self) -> None:
        """Abandon the checkpoint; the next save removes its partial files. A single rank may call it."""
        if self._background is not None:
            self._background.kill()

    def _stage(self) -> list[Any]:
        """A copy in host memory of what this rank writes, as Megatron Core's writer expects it."""
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
    """A new folder next to `folder`, the same on all ranks; leftovers of killed runs are removed.

    Its name is new every time, since a background process may outlive the run that started it.
    """
    temporary = folder.with_name(platform.from_first_rank(lambda: f".tmp-{folder.name}-{secrets.token_hex(4)}"))

    def make() -> None:
        if platform.is_first_rank():
            for old in folder.parent.glob(".tmp-*"):
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old, ignore_errors=True)
                else:  # the temporary link of a killed run that was about to replace `latest`
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
    """Prepare a checkpoint; the caller then chooses how its weights and states are written. All ranks call it.

    Without an optimizer it holds only weights, to start other runs from. `model_files` are written unchanged, by their
    names in the folder. Raises SaveError on all ranks.
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
    # Ranks with copies of a tensor share the writing; under FSDP only the first rank has it (_put_together).
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
    """Write a checkpoint completely or not at all, and point the `latest` beside it at it. All ranks call it.

    Without an optimizer it holds only weights, to start other runs from. Raises SaveError on all ranks.
    """
    tokenizer = read_tokenizer_files(tokenizer_path) if tokenizer_path else {}
    files = {f"tokenizer/{name}": content for name, content in tokenizer.items()}
    start_saving(folder, model, optimizer, trainer_state, recipe_yaml=recipe_yaml, model_files=files).finish()
