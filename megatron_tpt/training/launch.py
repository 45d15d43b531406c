"""Set-up and tear-down of a training program: run folder, lock, process groups. torch is imported only for the last."""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import Fault, UserError, is_of_full_disk
from megatron_tpt.training.run_lock import run_lock

# What gloo and NCCL report when a peer is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@contextlib.contextmanager
def _written_in(folder: Path) -> Iterator[None]:
    """Turn an OSError in the run folder into a UserError."""
    try:
        yield
    except OSError as error:
        if is_of_full_disk(error):  # the program says that the disk is full
            raise
        raise UserError(
            f"run.output_dir={folder}: nothing can be written there ({error.strerror}): give another folder"
        ) from None


def make_run_folder(folder: Path) -> None:
    """Make a run folder, or check that this user may continue an existing one, which another user may have made."""
    with _written_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        written = [folder / name for name in ("checkpoints", "tensorboard", "logs", "logs/heartbeats")]
        read = [folder / "metrics.jsonl", *(folder / "checkpoints").glob("step_*")]
        for path, right in [*((path, os.W_OK) for path in written), *((path, os.R_OK) for path in read)]:
            if path.exists() and not os.access(path, right | (os.R_OK | os.X_OK if path.is_dir() else 0)):
                act = "write" if right == os.W_OK else "read"
                raise UserError(
                    f"run.output_dir={folder}: {path} is another user's (uid {path.stat().st_uid}), and this one has "
                    f"no right to {act} there: ask for permission (chmod -R g+rwX), or give another folder"
                )


def require_shared_memory(num_workers: int) -> None:
    """Raise UserError when data-loading processes cannot run here because their locks need /dev/shm."""
    try:
        if num_workers:
            multiprocessing.Lock()
    except OSError as error:
        raise UserError(
            f"data.num_workers={num_workers} needs shared memory, and /dev/shm cannot be used here ({error.strerror}): "
            f"mount it, or give --data.num_workers=0"
        ) from None


def _refusal(action: Callable[[], None]) -> str | None:
    """The message of the UserError that an action raises; None if it raises none."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _refuse_together(refusal: str | None) -> None:
    """Raise UserError on all ranks when one has a refusal, so that no rank waits for one that has ended."""
    from megatron_tpt import platform

    for text in filter(None, platform.gather_objects(refusal)):
        raise UserError(text)


@contextlib.contextmanager
def distributed[R: Recipe](recipe: R, *, before: Callable[[R], None] | None = None) -> Iterator[None]:
    """The process groups of a recipe and the lock of its run folder, for one `with` block. One process of every machine
    first calls `before`. If it raises UserError, or another job holds the folder, all ranks raise it."""
    import torch

    from megatron_tpt import platform

    if recipe.run.threads_per_process is not None:
        torch.set_num_threads(recipe.run.threads_per_process)
    with contextlib.ExitStack() as stack:
        refusal = None
        if os.environ.get("RANK", "0") == "0":
            refusal = _refusal(lambda: _lock(recipe.run.output_dir, stack))
        if refusal is None and before is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            refusal = _refusal(lambda: before(recipe))
        with (
            _lost_ranks_reported(),
            platform.process_groups(recipe.parallel, timeout_s=recipe.run.first_step_timeout_s),
        ):
            _refuse_together(refusal)
            yield


@contextlib.contextmanager
def _lost_ranks_reported() -> Iterator[None]:
    """Report the death of another rank in one line instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST):
            raise
        raise Fault(
            "another rank has ended, or is unreachable: its messages say why (without any it was killed, perhaps for "
            "lack of memory). The same command resumes from the last checkpoint"
        ) from error


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock a run folder until `stack` is closed. Raises UserError when another job holds the lock."""
    with _written_in(folder):
        folder.mkdir(parents=True, exist_ok=True)  # benchmarks, for example, have not called `prepare`
        stack.enter_context(run_lock(folder))
