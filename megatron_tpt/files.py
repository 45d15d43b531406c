"""Files and folders that appear whole or not at all.

Everything is written under a temporary name next to its target, flushed to the disk, then renamed. A rename within one
folder is atomic on POSIX: a reader (or a process killed at any moment) sees the old content or the new, never a part.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import pretty

_BLOCK_BYTES = 1 << 16


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk: it outlives a power cut then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def real_path(path: str | Path) -> Path:
    """The path without links. (`Path.resolve` raises RuntimeError at a link that leads to itself; opening that path
    says what is wrong with it.)"""
    return Path(os.path.realpath(path))


def file_key(path: Path) -> tuple[int, int]:
    """What is the same for all names of a file or folder on this machine, and of no two at a time."""
    status = path.stat()
    return status.st_dev, status.st_ino


def free_space(path: Path) -> tuple[Path, int]:
    """The nearest folder of a path that is there, and the bytes that are free on its disk."""
    absolute = path.absolute()
    folder = next(one for one in (absolute, *absolute.parents) if one.is_dir())
    return folder, shutil.disk_usage(folder).free


@functools.cache
def _temporary_prefix() -> str:
    """How the names of temporary files begin where process numbers mean the same as here: on this host, and there in
    this namespace, as two containers may have one host name and each its own process 7."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f".tmp-{socket.gethostname()}-{namespace}-"


def _temporary_next_to(path: Path) -> Path:
    """A name that nobody can have guessed and put something under, in a folder that others may write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    # The suffixes stay last: writers choose the format by them.
    return path.with_name(f"{_temporary_prefix()}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@functools.cache  # once: a folder may hold many thousands of files, each of them written so
def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that processes of this machine left when they were killed."""
    for path in folder.glob(f"{glob.escape(_temporary_prefix())}*"):
        pid = path.name.removeprefix(_temporary_prefix()).partition("-")[0]
        if pid.isdecimal() and _is_gone(int(pid)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_gone(pid: int) -> bool:
    """Whether a process has ended. A zombie has: its exit status may never be asked for, as in a container whose first
    process is not an init."""
    import psutil  # here: the tools' --help does not need it

    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True
    except (PermissionError, OverflowError):  # another user's; the name of a file that only looks like ours
        return False


@contextlib.contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a new, empty temporary file; when the block ends without an exception it becomes `path`.

    The block must close what it wrote there. After an exception the temporary file is removed and `path` is untouched.
    Without `durable` the content is not flushed to the disk first: for progress reports that a power cut may take.
    """
    path = Path(path)
    temporary = _temporary_next_to(path)
    # O_EXCL: never through a link, and never into a file that was there before.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, indent: int = 2) -> None:
    """Write `value` to `path`, for programs and people, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(pretty(value, indent=indent))


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without an exception it becomes `path`.

    Raises UserError when `path` exists by then and is not empty: a finished folder is never replaced.
    """
    path = Path(path)
    temporary = _temporary_next_to(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UserError(
                f"{path} exists by now (by the same command, running twice?); choose another name"
            ) from None
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_symlink(target: str, link: str | Path) -> None:
    """Point `link` at `target` (a path relative to the link's folder), replacing a link that is there."""
    link = Path(link)
    temporary = _temporary_next_to(link)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    sync(link.parent)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file that one process writes, made if need be, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", opener=no_links) as file:
        # What a crash truncated must not swallow the line after it.
        is_whole = file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        file.write((b"" if is_whole else b"\n") + line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def appended_lines[T](path: Path, parse: Callable[..., T]) -> Iterator[T]:
    """`parse(**fields)` of the JSON objects that `append_line` has added; lines that a crash truncated are skipped."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield parse(**json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue


def no_links(path: str, flags: int) -> int:
    """An `opener` for `open` under a name that others can guess. Raises UserError for a link in its place."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: a link in the place of a file of this program; remove the link") from error


def file_checksum(path: Path) -> str:
    """ "sha256:" and the digest of a file's content."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path, max_blocks: int = 64) -> str:
    """A digest that detects a changed file at little cost: of its size and of blocks of 64 KiB spread evenly over it.

    Files of up to `max_blocks` blocks are read whole. It finds other weights or another corpus under an old name, not a
    changed letter somewhere in a large file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8))
    last = max(-(-size // _BLOCK_BYTES) - 1, 0)
    num_blocks = min(last + 1, max_blocks)
    with path.open("rb") as file:
        for i in range(num_blocks):
            file.seek(i * last // max(num_blocks - 1, 1) * _BLOCK_BYTES)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]
