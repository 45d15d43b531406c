"""The files of a run's checkpoints: which are complete, whether one is damaged, which are kept.

    RUN/checkpoints/step_00001000/   one checkpoint; checksums.json in it knows every other file by size and content
    RUN/checkpoints/latest           link to the newest
    RUN/checkpoints/damaged-step_*   one that did not match its checksums, set aside

Damage is looked for by all ranks at once, each reading its share of the files, and all come to the same decision.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import torch
import xxhash

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_symlink
from megatron_tpt.json_data import read_json

CHECKSUMS = "checksums.json"
_BLOCK_BYTES = 2**22
_NUM_THREADS = 4


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir())


def checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file: it tells damage, not forgery, at the speed of memory."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return f"xxh3_128:{digest.hexdigest()}"


def describe_files(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Size in bytes and checksum of the named files."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        sums = threads.map(lambda name: checksum(folder / name), names)
        return {name: [(folder / name).stat().st_size, value] for name, value in zip(names, sums, strict=True)}


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint that one process has made, once all its other files are there."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / CHECKSUMS).write_text(json.dumps(describe_files(folder, names), indent=1, sort_keys=True))


def _checked(files: Any) -> dict[str, list[Any]]:
    """What a file of checksums may hold: a size and a digest for files of the checkpoint, and of no other folder."""
    is_list = isinstance(files, dict) and all(isinstance(entry, list) and len(entry) == 2 for entry in files.values())
    if not is_list or any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in files):
        raise ValueError("it is not a list of files in this folder")
    return files


def _damage(folder: Path, *, reads_content: bool, rank: int, num_ranks: int) -> list[str]:
    """What is wrong with a rank's share of a checkpoint's files, one line each. Sizes first: they cost nothing."""
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
    """What is wrong with the presence and the sizes of a checkpoint's files, one line each. Needs no process group."""
    return _damage(folder, reads_content=False, rank=0, num_ranks=1)


def find_damage(folder: Path, *, reads_content: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, one line each, the same on all ranks. All ranks call it.

    Without `reads_content` only the files' sizes are compared.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = platform.gather_objects(_damage(folder, reads_content=reads_content, rank=rank, num_ranks=num_ranks))
    return sorted({line for share in shares for line in share})


def newest_whole_checkpoint(checkpoints: Path, *, reads_content: bool = True) -> Path | None:
    """The newest undamaged checkpoint of a run, None when it has none. All ranks call it and get the same.

    Damaged ones are announced and set aside, so that their steps can be written again. Raises UserError when there are
    checkpoints and all are damaged.
    """
    names = platform.gather_objects([folder.name for folder in finished_checkpoints(checkpoints)])[0]
    for name in reversed(names):
        folder = checkpoints / name
        damage = find_damage(folder, reads_content=reads_content)
        if not damage:
            if name != names[-1] and platform.is_first_rank():
                atomic_symlink(name, checkpoints / "latest")
            return folder
        if platform.is_first_rank():
            print(f"WARNING: THE CHECKPOINT {folder} IS DAMAGED: {'; '.join(damage[:4])}", flush=True)
            aside = folder.with_name(f"damaged-{name}")
            if name != names[0]:  # the last hope stays where it is
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
                print(f"WARNING: it is set aside as {aside}; the run goes on from the one before", flush=True)
        torch.distributed.barrier()
    if names:
        raise UserError(
            f"no checkpoint in {checkpoints} is whole: put back what is missing, or delete {names[0]} there "
            f"to begin again from step 0"
        )
    return None


def delete_old_checkpoints(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints, and those of steps that `keep_every` divides. The first rank
    calls it. What cannot be deleted now (a network file system keeps files that somebody reads) is warned of; the next
    checkpoint that is saved removes it."""
    for folder in finished_checkpoints(checkpoints)[:-keep_last]:
        if keep_every is not None and int(folder.name.removeprefix("step_")) % keep_every == 0:
            continue
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        try:
            folder.rename(doomed)  # in one step, so that no half-deleted folder looks complete
            shutil.rmtree(doomed)
        except OSError as error:
            print(f"WARNING: the old checkpoint {folder} could not be deleted: {error}", flush=True)
