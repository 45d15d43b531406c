"""What the user names - files, folders, patterns, data sets of the Hub - as a list of sources in a fixed order."""

import functools
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_tpt.errors import UserError, failure
from megatron_tpt.files import file_checksum, real_path
from megatron_tpt.names import counted, require_usable, shown
from megatron_tpt.records.folders import LOOP, REJECTED, REJECTS, Found, files_in, listed, why_not_read
from megatron_tpt.records.formats import READ_NAMES, file_format
from megatron_tpt.records.hub import SCHEME, HubDataset
from megatron_tpt.records.inventory import Inventories, require_content
from megatron_tpt.records.patterns import matches, matching

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The formats that are written."""


@dataclass(frozen=True)
class Source:
    """One file, or one shard of a data set on the Hub: what is read from its start to its end."""

    name: str
    """Names the source in messages and in `Record.meta`: the path as it was given, or hf://...#index-of-count."""
    num_bytes: int | None
    """Size of the file (packed, where it is), where known."""
    path: Path | None = None
    """The file; None for a shard of a data set."""
    dataset: HubDataset | None = None
    shard: int = 0
    checksum: str = ""
    """Of the file, as the job that wrote it recorded it; empty where none did."""
    real_path: Path | None = None
    """The file, by its path without links."""

    def require_content(self, checksum: str | None = None) -> None:
        """Raise UserError where the content of the file, of which `checksum` is known or is found out here, is not what
        the job that wrote it recorded."""
        if self.checksum and self.path is not None:
            require_content(self.path, checksum or file_checksum(self.path), self.checksum)


def expand_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The sources behind `inputs`, each once, whatever its names (links too), in the order of their first names.

    - A file is itself (for the names that are read, see `formats`).
    - A folder is the record files in it at any depth, sorted, links followed; hidden names are not read (unfinished
      files have such names), nor folders called "rejects", where jobs put what they rejected. A folder written by
      `save_to_disk` is the files of that data set.
    - A pattern ("data/**/*.jsonl.zst") is the files and folders that it matches, sorted.
    - "hf://owner/name/config?split=train" is the shards of that data set on the Hub (see `HubDataset.parse`).

    Other files of a folder, and what is named twice, are logged. Raises UserError for what is missing or of
    an unknown kind (matched by a pattern, too, unless that ends in a bare "*" or "**"), for names that are no UTF-8 or
    hold control characters, for a folder or pattern without record files, and for no input at all.
    """
    sources: dict[str, Source] = {}
    repeated: dict[str, None] = {}
    files = _FileSources()
    for text in map(str, inputs):
        for source in _hub_sources(text) if text.startswith(SCHEME) else files.sources(text):
            key = source.name
            if source.path is not None and source.real_path is not None:
                require_usable(source.path, source.real_path)
                key = str(source.real_path)
            if sources.setdefault(key, source) is not source:
                repeated[source.name] = None
    if not sources:
        raise UserError("no input files were given")
    for note in files.inventories.notes():
        _say(note)
    if repeated:
        several = f"{counted(len(repeated), 'input')} given or found under several names"
        _say(f"{several}; each is read once: {listed([*repeated])}")
    return list(sources.values())


@functools.lru_cache(maxsize=1024)
def _say(message: str) -> None:
    """Log a line once in a process, as inputs are expanded again and again."""
    logger.info(shown(message))


def expand_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """The files behind `paths`, for programs that read nothing else (see `expand_sources`)."""
    return [source.path for source in expand_files(paths) if source.path]


def expand_files(paths: Sequence[str | Path]) -> list[Source]:
    """`expand_sources` for programs that read files and nothing else."""
    sources = expand_sources(paths)
    for source in sources:
        if source.path is None:
            raise UserError(f"{source.name}: only files are read here; download the data set and name its folder")
    return sources


class _FileSources:
    """Makes sources of files, and reads nothing of their folders twice."""

    def __init__(self) -> None:
        self.inventories = Inventories()
        self._real_folders: dict[Path, Path] = {}

    def sources(self, text: str) -> list[Source]:
        """The files behind a name, each as long as a job recorded it, and of those recorded none is missing."""
        files = _files(text)
        sources = [self._source(path) for path in files]
        path = Path(os.path.expanduser(text))
        folders = dict.fromkeys(file.parent for file in files)
        if path.is_dir():
            self.inventories.require_all([path, *folders], lambda file: file.parent.name != REJECTS)
        elif not path.exists():
            self.inventories.require_all(folders, partial(_is_meant, path))
        return sources

    def _source(self, path: Path) -> Source:
        try:
            num_bytes = path.stat().st_size
            without_links = self._real_path(path)
            checksum = self.inventories.check(without_links)
            is_empty = num_bytes == 0 and not _first_byte(path)
        except OSError as error:
            raise failure(f"{shown(path)}: cannot be read ({error.strerror})", error) from error
        if is_empty:
            raise UserError(
                f"{shown(path)}: has no bytes, as files do after a disk was full; remove it, or make or fetch it again"
            )
        return Source(str(path), num_bytes, path, checksum=checksum, real_path=without_links)

    def _real_path(self, path: Path) -> Path:
        if path.is_symlink():
            return real_path(path)
        folder = path.parent
        if folder not in self._real_folders:
            self._real_folders[folder] = real_path(folder)
        return self._real_folders[folder] / path.name


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _is_meant(pattern: Path, file: Path) -> bool:
    """Whether a pattern matches a file, or a folder that it is in."""
    if file.parent.name == REJECTS and REJECTS not in pattern.parts:
        return False
    return any(matches(path.parts, pattern.parts) for path in (file, *file.parents))


def _hub_sources(url: str) -> Iterator[Source]:
    dataset = HubDataset.parse(url)
    num_shards = dataset.num_shards()
    for shard in range(num_shards):
        yield Source(f"{url}#{shard:05d}-of-{num_shards:05d}", None, None, dataset, shard)


def _files(text: str) -> list[Path]:
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        found = files_in(path)
        if not found.files:
            also = f"; {unread}" if (unread := found.describe_unread()) else ""
            raise UserError(f"{shown(path)}: no record files in this folder ({READ_NAMES}){also}")
    elif path.exists():
        if file_format(path) is None or not path.is_file():
            raise UserError(f"{shown(path)}: unknown kind of file; records are read from {READ_NAMES}")
        return [path]
    elif not glob.has_magic(text):
        raise UserError(f"{shown(path)}: no such file or folder")
    else:
        found = _matches(path)
        if not found.files:
            also = f"; {unread}" if (unread := found.describe_unread()) else ""
            raise UserError(f"{shown(path)}: nothing matches this pattern ({READ_NAMES}){also}")
    if unread := found.describe_unread():
        _say(f"{shown(path)}: {unread}")
    return found.files


def _matches(pattern: Path) -> Found:
    """What a pattern matches. Raises UserError for a match that cannot be read, where the pattern says which files it
    means."""
    found = Found()
    means_all = pattern.name in ("*", "**")
    matches, loops = matching(pattern)
    for loop in loops:
        found.omit(LOOP, str(loop))
    for match in matches:
        if REJECTS in match.parts and REJECTS not in pattern.parts:
            found.omit(REJECTED, str(match))
        elif match.is_dir():
            if pattern.name != "**":  # which matches the files within as well
                _add(found, match)
        elif (why := why_not_read(match) if means_all else None) is not None:
            found.omit(why, str(match))
        elif file_format(match) is None or not match.is_file():
            is_broken = match.is_symlink() and not match.exists()
            problem = "is a link to nothing" if is_broken else f"is not of a kind that is read ({READ_NAMES})"
            raise UserError(f"{shown(pattern)}: matches {shown(match)}, which {problem}; name what is to be read")
        else:
            found.files.append(match)
    return found


def _add(found: Found, folder: Path) -> None:
    """Put what a folder holds into `found`, under names with that folder."""
    inner = files_in(folder)
    found.files += inner.files
    for why, names in inner.unread.items():
        for name in names:
            found.omit(why, str(folder / name))
