"""What the user names - files, folders, patterns, data sets of the Hub - as a list of sources in a fixed order."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.errors import UserError, failure
from megatron_tpt.files import file_fingerprint
from megatron_tpt.records.hub import SCHEME, HubDataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The formats that are written."""
REJECTS = "rejects"
"""The folder in a job's output for what it left out, in the formats of records."""
_FOUND_SUFFIXES = (*SUFFIXES, ".json.gz", ".json.zst")
"""What counts as records in a folder. A plain .json is more often a configuration, so it must be named."""
_READ_SUFFIXES = (*_FOUND_SUFFIXES, ".json", ".arrow")


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

    - A file is itself.
    - A folder is the record files in it at any depth, sorted; hidden names are left out (unfinished files have such
      names), and folders called "rejects", where jobs put what they left out. A folder written by `save_to_disk` is
      the files of that data set.
    - A pattern ("data/**/*.jsonl.zst") is the files and folders that it matches, sorted.
    - "hf://owner/name/config?split=train" is the shards of that data set on the Hub (see `HubDataset.parse`).

    Raises UserError for what is missing or of an unknown kind, a folder or pattern without record files, and for no
    input at all.
    """
    sources: dict[str, Source] = {}
    for text in map(str, inputs):
        for source in _hub_sources(text) if text.startswith(SCHEME) else map(_file_source, _files(text)):
            sources.setdefault(str(source.path.resolve()) if source.path else source.name, source)
    if not sources:
        raise UserError("no input files were given")
    return list(sources.values())


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
        raise failure(f"{path}: cannot be read ({error.strerror})", error) from error


def _hub_sources(url: str) -> Iterator[Source]:
    dataset = HubDataset.parse(url)
    num_shards = dataset.num_shards()
    for shard in range(num_shards):
        yield Source(f"{url}#{shard:05d}-of-{num_shards:05d}", None, None, dataset, shard)


def _files(text: str) -> list[Path]:
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        found = _folder_files(path)
        if not found:
            raise UserError(f"{path}: no record files in this folder ({', '.join(_FOUND_SUFFIXES)})")
        return found
    if path.exists():
        if not path.name.endswith(_READ_SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; records are read from {', '.join(_READ_SUFFIXES)}")
        return [path]
    if not glob.has_magic(text):
        raise UserError(f"{path}: no such file or folder")
    suffixes = _READ_SUFFIXES if text.endswith((".json", ".arrow")) else _FOUND_SUFFIXES
    found = []
    for match in sorted(map(Path, glob.iglob(str(path), recursive=True))):
        if REJECTS in match.parts and REJECTS not in path.parts:
            continue
        if not match.is_dir():
            found += [match] if match.name.endswith(suffixes) else []
        elif path.name != "**":  # which matches the files within as well
            found += _folder_files(match)
    if not found:
        raise UserError(f"{path}: nothing matches this pattern ({', '.join(suffixes)})")
    return found


def _folder_files(folder: Path) -> list[Path]:
    if (saved := _saved_dataset(folder)) is not None:
        return saved
    found = (file for file in folder.rglob("*") if file.name.endswith(_FOUND_SUFFIXES) and file.is_file())
    return sorted(file for file in found if not _is_left_out(file.relative_to(folder).parts))


def _is_left_out(names: Iterable[str]) -> bool:
    return any(name.startswith(".") or name == REJECTS for name in names)


def _saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a data set that was saved by `Dataset.save_to_disk`, None for any other folder."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            if len(splits) != 1:
                names = ", ".join(str(folder / split) for split in splits)
                raise UserError(f"{folder}: holds several splits; name one: {names}")
            return _saved_dataset(folder / splits[0])
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            files = json.loads((folder / "state.json").read_bytes())["_data_files"]
            return [folder / file["filename"] for file in files]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder}: its description as a saved data set is broken ({error!r}); save it again"
        ) from error
    return None


def source_fingerprint(source: Source, num_sources: int) -> str | None:
    """As `file_fingerprint`, of less where there are thousands of files; None for what is not a file."""
    return file_fingerprint(source.path, max_blocks=max(64 // num_sources, 2)) if source.path else None
