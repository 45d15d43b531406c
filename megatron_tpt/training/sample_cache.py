"""The cache folder of sample indices, shared between runs.

Megatron Core writes its cache in place and only from global rank 0: a killed job leaves a truncated file that later
counts as a hit, and machines with a local cache find nothing. Here an entry appears completely or not at all, and the
first process that needs it builds it: any number of threads, processes and machines may use a folder at once, and
machines may have one each. The files are those that Megatron Core looks for: NAME-description.txt and NAME-ARRAY.npy.
"""

import contextlib
import logging
import math
import mmap
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from megatron_tpt.errors import UserError
from megatron_tpt.files import no_links, sync_tree
from megatron_tpt.jobs.lock import has_locks, locked
from megatron_tpt.logs import ALL_RANKS

logger = logging.getLogger(__name__)

_LARGE_BYTES = 64 << 20
SMALL_BYTES = 64 << 10
"""Files up to this size are read, not mapped: a map keeps a file open, and a process can have some 65,000 maps (Linux's
vm.max_map_count), which tens of thousands of sources would exceed."""
_ABANDONED_AFTER_S = 24 * 3600


class MissingEntryError(UserError):
    """An entry is not in the cache, and this process is not the one to build it."""


class SampleCache:
    """Entries are opened with `arrays`; within `with cache.building():`, missing ones are built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._staging: Path | None = None
        self._large_build = threading.Lock()

    def __reduce__(self) -> tuple[type["SampleCache"], tuple[Path]]:
        """Another process opens the folder itself, and cannot build."""
        return SampleCache, (self.folder,)

    def arrays(
        self,
        name: str,
        description: str,
        kinds: Sequence[str],
        build: Callable[[], Sequence[np.ndarray]],
        num_bytes: int,
    ) -> list[np.ndarray]:
        """The arrays of the entry `name`, memory-mapped from its files, which `build` creates if they are missing.

        Large ones (by `num_bytes`) are built one at a time, whatever the number of threads, to bound memory.
        """
        if (found := self._open(name, kinds)) is not None:
            return found
        if self._staging is None:
            raise MissingEntryError(
                f"{self.folder}: no complete sample index {name}; the first process of each machine builds it, in a "
                "folder that its other processes must see (data.cache_dir); tools/build_cache.py builds it ahead"
            )
        with self._large_build if num_bytes >= _LARGE_BYTES else contextlib.nullcontext():
            self._publish(name, description, dict(zip(kinds, build(), strict=True)), self._staging)
        found = self._open(name, kinds)
        assert found is not None
        return found

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Within the block, build missing entries. One process at a time does so; others wait and then use them.

        Without locks (see `task_lock`) several may build the same entry, and the first to finish wins. Leftovers of
        killed processes are removed. Raises UserError when the folder cannot be written.
        """
        prefix = f".building-{socket.gethostname()}_"  # host names have no "_", so no prefix is that of another host
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "a", opener=no_links) as lock:
                self._lock(lock)
                self._remove_leftovers(prefix if has_locks() else None)
                self._staging = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
                try:
                    yield
                finally:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    self._staging = None
        except OSError as error:
            raise UserError(
                f"{self.folder}: the sample indices cannot be built there ({error}); fix that, "
                "or name another folder as data.cache_dir"
            ) from error

    def _lock(self, file: IO[str]) -> None:
        """Lock `file` until it is closed, at the latest when this process ends."""
        if not locked(file.fileno(), self.folder / ".lock", timeout_s=0):
            logger.info(f"{self.folder}: another process builds sample indices here; waiting", extra=ALL_RANKS)
            locked(file.fileno(), self.folder / ".lock", timeout_s=math.inf)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}-{kind}"

    def _open(self, name: str, kinds: Sequence[str]) -> list[np.ndarray] | None:
        """The arrays of an entry; None when one is missing or truncated. One stat and one open per array."""
        if not self._path(name, "description.txt").exists():
            return None
        try:
            return [_map(self._path(name, f"{kind}.npy")) for kind in kinds]
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning(f"{self._path(name, '*.npy')}: not whole ({error})", extra=ALL_RANKS)
            return None

    def _publish(self, name: str, description: str, arrays: dict[str, np.ndarray], staging: Path) -> None:
        """Write an entry and move it to its place; the description comes last and marks the entry as complete."""
        folder = Path(tempfile.mkdtemp(dir=staging))
        for kind, array in arrays.items():
            np.save(folder / f"{name}-{kind}.npy", array, allow_pickle=False)
        (folder / f"{name}-description.txt").write_text(description)
        sync_tree(folder)
        if self._open(name, list(arrays)) is None:  # never replace files that another process may be reading
            for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".txt"):
                os.replace(path, self.folder / path.name)

    def _remove_leftovers(self, our_prefix: str | None) -> None:
        """Remove leftovers of killed builds: those of this host, since we hold the lock, and old ones of any host."""
        for folder in self.folder.glob(".building-*"):
            with contextlib.suppress(FileNotFoundError):
                is_ours = our_prefix is not None and folder.name.startswith(our_prefix)
                if is_ours or folder.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _map(path: Path) -> np.ndarray:
    """The array in a file of numpy.save, memory-mapped. Raises ValueError when the file is truncated.

    Small ones are read. numpy's own memmap takes twice as long for thousands of files, since it resolves every
    component of each path.
    """
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("unknown version of numpy's format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin, is_small = file.tell(), os.fstat(file.fileno()).st_size <= SMALL_BYTES
        file.seek(0)
        data = file.read() if is_small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return np.ndarray(shape, dtype, data, begin)
        except TypeError as error:
            raise ValueError(str(error)) from None
