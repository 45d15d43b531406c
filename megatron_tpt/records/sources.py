"""What the user names - files, folders, patterns, data sets of the Hub - as a list of sources in a fixed order."""

import functools
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.errors import UserError, failure
from megatron_tpt.names import require_usable, shown
from megatron_tpt.records.folders import LOOP, REJECTED, REJECTS, Found, files_in, listed, why_not_read
from megatron_tpt.records.formats import READ_NAMES, file_format
from megatron_tpt.records.hub import SCHEME, HubDataset
from megatron_tpt.records.patterns import matching

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The formats that are written."""


@dataclass(frozen=True)
class Source:
    """One file, or one shard of a data set on the Hub: what is read from its start to its end."""

    name: str
    """Stands for the source in messages and in `Record.meta`: the path as it was given, or hf://...#index-of-count."""
    num_bytes: int | None
    """Size of the file (packed, where it is), where known."""
    path: Path | None = None
    """The file; None for a shard of a data set."""
    dataset: HubDataset | None = None
    shard: int = 0


def expand_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The sources behind `inputs`, each once, whatever its names (links too), in the order of their first names.

    - A file is itself (for the names that are read, see `formats`).
    - A folder is the record files in it at any depth, sorted, links followed; hidden names are not read (unfinished
      files have such names), nor folders called "rejects", where jobs put what they rejected. A folder written by
      `save_to_disk` is the files of that data set.
    - A pattern ("data/**/*.jsonl.zst") is the files and folders that it matches, sorted.
    - "hf://owner/name/config?split=train" is the shards of that data set on the Hub (see `HubDataset.parse`).

    What a folder holds besides, and what is named twice, is said on stderr. Raises UserError for what is missing or of
    an unknown kind (matched by a pattern, too, unless that ends in a bare "*" or "**"), for names that are no UTF-8 or
    hold control characters, for a folder or pattern without record files, and for no input at all.
    """
    sources: dict[str, Source] = {}
    repeated: dict[str, None] = {}
    for text in map(str, inputs):
        for source in _hub_sources(text) if text.startswith(SCHEME) else map(_file_source, _files(text)):
            key = source.name
            if source.path is not None:
                real_path = source.path.resolve()
                require_usable(source.path, real_path)
                key = str(real_path)
            if sources.setdefault(key, source) is not source:
                repeated[source.name] = None
    if not sources:
        raise UserError("no input files were given")
    if repeated:
        several = f"{len(repeated):,} inputs were given or found under several names"
        _say(f"{several}; each is read once: {listed([*repeated])}")
    return list(sources.values())


@functools.lru_cache(maxsize=1024)
def _say(message: str) -> None:
    """Print a line on stderr, once in a process, as inputs are expanded again and again; under torchrun, in one."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(shown(message), file=sys.stderr, flush=True)


def expand_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """The files behind `paths`, for programs that read nothing else (see `expand_sources`)."""
    files: list[Path] = []
    for source in expand_sources(paths):
        if source.path is None:
            raise UserError(f"{source.name}: only files are read here; download the data set and name its folder")
        files.append(source.path)
    return files


def _file_source(path: Path) -> Source:
    try:
        return Source(str(path), path.stat().st_size, path)
    except OSError as error:
        raise failure(f"{shown(path)}: cannot be read ({error.strerror})", error) from error


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
