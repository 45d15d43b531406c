"""The files of a run's checkpoints: which are complete, which is the newest, whether one is damaged, which are kept.

    RUN/checkpoints/step_00001000/   one checkpoint; its checksums.json lists size and digest of every other file
    RUN/checkpoints/latest           link to the newest; a file with its name where the file system has no links
    RUN/checkpoints/damaged-step_*   one that did not match its checksums, set aside

All ranks check for damage in parallel, each reading its share of the files, and reach the same decision. torch is
imported only for that.

If a run folder is copied without links (`cp -L`, `rsync -L`, a bucket), `latest` becomes a folder: a second copy of a
checkpoint, or the only one. Therefore the step_* folders determine the newest checkpoint, for the run and for readers
of `latest`. A run renames an only copy to its step, and removes a second copy once the first is known to be intact.
"""

import errno
import json
import logging
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import xxhash

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_symlink, atomic_write, real_path
from megatron_tpt.json_data import read_json

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
LATEST = "latest"
_BLOCK_BYTES = 2**22
_NUM_THREADS = 4


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def step_number(folder: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(folder.name.removeprefix("step_"))


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir())


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file: it detects damage, not tampering, at memory speed."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return f"xxh3_128:{digest.hexdigest()}"


def describe_files(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Size in bytes and checksum of the named files, by name."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        sums = threads.map(lambda name: checksum(folder / name), names)
        return {name: [(folder / name).stat().st_size, value] for name, value in zip(names, sums, strict=True)}


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint that one process has written, after all its other files."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS
    )
    (folder / CHECKSUMS).write_text(json.dumps(describe_files(folder, names), indent=1, sort_keys=True))


def _checked(files: Any) -> dict[str, list[Any]]:
    """Validate checksums.json: it may only hold size and digest of files of this checkpoint, not of other folders."""
    is_list = isinstance(files, dict) and all(isinstance(entry, list) and len(entry) == 2 for entry in files.values())
    if not is_list or any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in files):
        raise ValueError("it is not a list of files in this folder")
    return files


def _damage(folder: Path, *, reads_content: bool, rank: int, num_ranks: int) -> list[str]:
    """The damage in a rank's share of a checkpoint's files, one line each. Sizes are compared first, which is cheap."""
    try:
        files: dict[str, list[Any]] = _checked(read_json(folder / CHECKSUMS))
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"]
    except (OSError, ValueError) as error:
        return [f"{CHECKSUMS} cannot be read ({error})"]
    own = sorted(files)[rank::num_ranks]
    wrong = []
    for name in own:
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}")
            continue
        if num_bytes != files[name][0]:
            wrong.append(f"{name} has {num_bytes} bytes in place of {files[name][0]}")
    if wrong or not reads_content:
        return wrong
    try:
        found = describe_files(folder, own)
    except OSError as error:
        return [f"{error.filename or folder}: {error.strerror}"]
    return [f"{name} has other content than was written" for name in own if found[name] != files[name]]


def damage_of_files(folder: Path) -> list[str]:
    """Missing files of a checkpoint and files of the wrong size, one line each. Needs no process group."""
    return _damage(folder, reads_content=False, rank=0, num_ranks=1)


def refuse_damaged(folder: Path) -> None:
    """Raise UserError where files of a checkpoint that has checksums are missing or of the wrong size."""
    if (folder / CHECKSUMS).exists() and (damage := damage_of_files(folder)):
        raise UserError(f"{folder} is damaged ({'; '.join(damage[:4])}): give another checkpoint")


def find_damage(folder: Path, *, reads_content: bool = True) -> list[str]:
    """The damage in a checkpoint's files, one line each, the same on all ranks. All ranks call it.

    Without `reads_content` only the sizes of the files are compared.
    """
    import torch

    from megatron_tpt import platform

    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = platform.gather_objects(_damage(folder, reads_content=reads_content, rank=rank, num_ranks=num_ranks))
    return sorted({line for share in shares for line in share})


def _step_of(folder: Path) -> str | None:
    """The step_* name that belongs to a checkpoint, whatever its folder is called; None when it cannot be read."""
    from megatron_tpt.training.checkpoint_loading import read_trainer_state

    try:
        return step_folder(folder.parent, read_trainer_state(folder)["step"]).name
    except Exception:  # a folder that is no checkpoint, or an incomplete one, can raise nearly anything
        return None


def _is_copied(latest: Path) -> bool:
    return latest.is_dir() and not latest.is_symlink()


def _has_same_sums(folder: Path, other: Path) -> bool:
    try:
        return (folder / CHECKSUMS).read_bytes() == (other / CHECKSUMS).read_bytes()
    except OSError:
        return False


def _twin(latest: Path) -> Path | None:
    """The checkpoint of which a copied `latest` is a second copy, by its checksums."""
    folders = finished_checkpoints(latest.parent)
    return next((folder for folder in reversed(folders) if _has_same_sums(latest, folder)), None)


def checkpoints_to_read(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, including a copied `latest` that is the only copy of its
    step."""
    folders, latest = finished_checkpoints(checkpoints), checkpoints / LATEST
    if _is_copied(latest) and _twin(latest) is None and (name := _step_of(latest)) is not None:
        named = {folder.name: folder for folder in folders}
        folders = [folder for _, folder in sorted(({name: latest} | named).items())]
    return folders


def checkpoint_named(path: Path) -> Path:
    """The checkpoint that a user's `path` means: RUN/checkpoints/latest is the newest there, whatever happened to the
    link. Warns if the link names another."""
    if path.name != LATEST or not (there := checkpoints_to_read(path.parent)):
        return path
    newest = there[-1]
    if _is_copied(path) and _has_same_sums(newest, path) and damage_of_files(newest):
        return path  # the intact one of two copies
    if newest != path and not (path.is_symlink() and real_path(path) == real_path(newest)):
        logger.warning(f"{path} is no link to the newest checkpoint: using {newest}")
    return newest


def _name_only_copy(latest: Path) -> None:
    """Rename a copied `latest` that is the only copy of its step to that step. The first rank calls it."""
    if not _is_copied(latest) or _twin(latest) is not None:
        return
    name = _step_of(latest)
    folder = latest.with_name(name) if name is not None else None
    if folder is None or folder.exists():
        folder = latest.with_name(f"copied-{LATEST}-{secrets.token_hex(4)}")
        kept = "an unreadable checkpoint" if name is None else f"and differs from the {name} beside it"
        logger.warning(f"{latest} is a folder instead of a link, {kept}: it is moved to {folder}")
    else:
        logger.warning(f"{latest} is a folder instead of a link, the only copy: it is now {folder}")
    os.rename(latest, folder)


def point_latest(folder: Path, *, is_whole: bool = False) -> None:
    """Make `latest` name the checkpoint `folder`; `is_whole` says that its content was just compared with its
    checksums. A second copy in place of the link is removed. One process calls it."""
    latest = folder.with_name(LATEST)
    _name_only_copy(latest)
    if _is_copied(latest) and (twin := _twin(latest)) is not None:
        is_kept = (is_whole and twin == folder) or not _damage(twin, reads_content=True, rank=0, num_ranks=1)
        aside = latest.with_name(f".tmp-old-{LATEST}" if is_kept else f"copied-{LATEST}-{secrets.token_hex(4)}")
        what = "removed" if is_kept else f"moved to {aside}, since {twin} is damaged"
        logger.warning(f"{latest} is a folder instead of a link, a copy of {twin.name}: it is {what}")
        os.rename(latest, aside)
        if is_kept:
            shutil.rmtree(aside, ignore_errors=True)
    if latest.is_symlink() and os.readlink(latest) == folder.name:
        return
    try:
        atomic_symlink(folder.name, latest)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with atomic_write(latest) as path:  # a file system without links
            path.write_text(f"{folder.name}\n")


def _set_damaged_aside(folder: Path, damage: list[str], *, is_last: bool) -> None:
    """Warn of a damaged checkpoint, and rename it unless it is the last candidate."""
    logger.warning(f"THE CHECKPOINT {folder} IS DAMAGED: {'; '.join(damage[:4])}")
    if is_last:
        return
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    logger.warning(f"it is moved to {aside}; the run resumes from the one before")


def _require_no_other_place(checkpoints: Path) -> None:
    """Raise UserError when the only checkpoint of a run folder is a `latest` that links to another folder."""
    latest = checkpoints / LATEST
    if latest.is_symlink() and (latest / CHECKSUMS).exists():
        raise UserError(
            f"{latest} leads to {real_path(latest)}, and there is no checkpoint in {checkpoints}: copy that folder "
            f"there under its own name (step_...) to resume from it, or remove {latest} to start at step 0"
        )


def newest_whole_checkpoint(checkpoints: Path, *, reads_content: bool = True) -> Path | None:
    """The newest undamaged checkpoint of a run, None when it has none. All ranks call it, with the same result.

    Damaged ones are reported and renamed, so that their steps can be written again; `latest` is updated to the returned
    one. Raises UserError when there are checkpoints and all are damaged.
    """
    import torch

    from megatron_tpt import platform

    latest, is_first = checkpoints / LATEST, platform.is_first_rank()
    while True:
        if is_first:
            _name_only_copy(latest)
        names = platform.gather_objects([folder.name for folder in finished_checkpoints(checkpoints)])[0]
        if not names:
            _require_no_other_place(checkpoints)
            return None
        folder = checkpoints / names[-1]
        damage = find_damage(folder, reads_content=reads_content)
        has_copy = platform.gather_objects(_is_copied(latest))[0]
        is_last = len(names) == 1 and not has_copy
        if is_first and damage:
            _set_damaged_aside(folder, damage, is_last=is_last)
        elif is_first:
            point_latest(folder, is_whole=reads_content)
        torch.distributed.barrier()
        if not damage:
            return folder
        if is_last:
            raise UserError(
                f"no checkpoint in {checkpoints} is whole: restore the missing files, or delete {names[0]} there to "
                f"start again at step 0"
            )


def delete_old_checkpoints(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints, and those of steps that `keep_every` divides. The first rank
    calls it."""
    for folder in finished_checkpoints(checkpoints)[:-keep_last]:
        if keep_every is None or step_number(folder) % keep_every:
            delete_checkpoint(folder)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. What cannot be deleted now (a network file system keeps files that somebody reads) is warned
    of; the next checkpoint that is saved removes it."""
    doomed = folder.with_name(f".tmp-old-{folder.name}")
    try:
        folder.rename(doomed)  # in one step, so that no half-deleted folder looks complete
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning(f"the old checkpoint {folder} could not be deleted: {error}")
