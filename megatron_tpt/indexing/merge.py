"""Many indices into one without tokenising again: the job behind `tools/merge_index.py`.

The tokens are copied, the `.idx` follows from those of the shards; the result is byte for byte what indexing all of the
input at once gives. Few files are open at a time, and memory does not grow with the data.
"""

import dataclasses
import glob
import hashlib
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum, no_links, real_path
from megatron_tpt.indexing.journal import clear_leftovers, is_publishing, working_folder
from megatron_tpt.indexing.manifest import IndexCounts, Manifest
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.output import KINDS, publish
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.shard_sets import require_whole_sets
from megatron_tpt.indexing.verification import check_structure, row_chunks
from megatron_tpt.indexing.writer import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_tpt.logs import print_result

logger = logging.getLogger(__name__)

_COPY_BYTES = 8 << 20
_NUM_THREADS = 16
_SUFFIXES = (".idx", ".bin", ".json")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One index to merge, as its header, its sizes and its manifest describe it."""

    prefix: Path
    dtype: str
    num_sequences: int
    num_documents: int
    num_bytes: int
    """Of `.bin`."""
    manifest: Manifest | None


def merge(options: MergeOptions) -> Manifest | None:
    """Merge indices into `options.output`.{bin,idx,json} and return the manifest, None where shards have none.

    When that very merger is there already, it is left alone. Raises UserError for shards that are missing, damaged or
    incompatible, for too little space, and for an output of other content; then nothing new is there.
    """
    prefixes = expand_prefixes(options.input, options.list_file, options.output)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        shards = list(threads.map(lambda prefix: _examine(prefix, options.require_manifests), prefixes))
    _require_alike(shards)
    manifest = _merged_manifest(shards)
    if _is_finished(options.output, manifest):
        clear_leftovers(options.output, KINDS)
        print_result(f"{options.output}: already done, {_summary(shards)}")
        return Manifest.read(options.output)
    with working_folder(options.output, KINDS) as folder:
        _require_space(folder, shards)
        part = folder / "00000"
        checksums = {"bin": _copy_tokens(shards, Path(f"{part}.bin"), options.verify)}
        _write_idx(shards, Path(f"{part}.idx"))
        checksums["idx"] = file_checksum(Path(f"{part}.idx"))
        if manifest is not None:
            manifest = dataclasses.replace(manifest, checksums=checksums)
            manifest.write(part)
        publish(folder, [options.output])
    print_result(f"{options.output}: {_summary(shards)}")
    return manifest


def expand_prefixes(inputs: Sequence[str], list_file: Path | None, output: Path) -> list[Path]:
    """The indices behind prefixes, files, globs and folders, in their order; those of a glob or a folder by name.

    In a glob or a folder `output`, which an earlier run may have put there, is skipped, and that is said. Raises
    UserError for what is not there, for an index that is named twice, and for none at all.
    """
    names = list(inputs)
    if list_file is not None:
        try:
            names += [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{list_file}: cannot be read as a list of indices ({error})") from None
    prefixes = [prefix for name in names for prefix in _expand(name, output)]
    if not prefixes:
        raise UserError(
            "no indices were given: name prefixes, globs or folders (--input) or a list of them (--list-file)"
        )
    seen = {real_path(output)}
    for prefix in prefixes:
        if (real := _real_prefix(prefix)) in seen:
            raise UserError(f"{prefix} is named twice, or is the output too; name each index once")
        seen.add(real)
    return prefixes


def _expand(name: str, output: Path) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = [file for file in path.rglob("*.idx") if not _is_hidden(file.relative_to(path))]
    elif path.suffix in _SUFFIXES and path.is_file():
        return [path.with_suffix("")]
    elif Path(f"{name}.idx").exists() or not glob.has_magic(name):
        return [path]
    else:
        files = [Path(file) for file in {*glob.glob(f"{name}.idx"), *glob.glob(name)} if file.endswith(".idx")]
    if not files:
        raise UserError(f"{name}: no index found (PREFIX.idx)")
    found = [file.with_suffix("") for file in sorted(files)]
    require_whole_sets(found, name, ".idx")
    if is_output := [prefix for prefix in found if _real_prefix(prefix) == real_path(output)]:
        logger.info(f"{name}: {is_output[0]} is the output, and not merged into itself")
    return [prefix for prefix in found if prefix not in is_output]


def _real_prefix(prefix: Path) -> Path:
    """A prefix without links in its path, and that which a link PREFIX.idx leads to."""
    return real_path(f"{prefix}.idx").with_suffix("")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _examine(prefix: Path, require_manifest: bool) -> Shard:
    manifest = None
    if require_manifest or Manifest.path(prefix).exists():
        manifest = Manifest.read(prefix)
        manifest.check_files(prefix)
        manifest.check_idx(prefix)
    reader = IndexReader(prefix)
    if manifest is not None and manifest.dtype != reader.dtype.name:
        raise UserError(f"{prefix}.idx: holds {reader.dtype.name}, its manifest says {manifest.dtype}; index again")
    num_bytes = reader.num_tokens * reader.dtype.itemsize
    return Shard(prefix, reader.dtype.name, reader.num_sequences, reader.num_documents, num_bytes, manifest)


_MAY_DIFFER = ("dtype", "sources", "counts", "checksums", "command", "text_column", "shard_bytes", "where")


def _settings(shard: Shard) -> dict[str, Any]:
    """What must be the same in all shards."""
    settings: dict[str, Any] = {"token type": shard.dtype}
    if shard.manifest is not None:
        for field in dataclasses.fields(Manifest):
            if field.name not in _MAY_DIFFER:
                settings[field.name.replace("_", " ")] = getattr(shard.manifest, field.name)
        # The same tokenizer may lie in several places.
        settings["tokenizer"] = dataclasses.replace(shard.manifest.tokenizer, path="")
    return settings


def _require_alike(shards: list[Shard]) -> None:
    first, expected = shards[0], _settings(shards[0])
    for shard in shards[1:]:
        found = _settings(shard)
        for name in expected.keys() & found.keys():
            if found[name] != expected[name]:
                raise UserError(
                    f"{first.prefix} and {shard.prefix} cannot be merged: {name} is {expected[name]} in the one and "
                    f"{found[name]} in the other; index them alike, or omit one"
                )


def _merged_manifest(shards: list[Shard]) -> Manifest | None:
    """The manifest of the merger but for its checksums; None unless all shards have one."""
    manifests = [shard.manifest for shard in shards if shard.manifest is not None]
    if len(manifests) < len(shards):
        return None
    return dataclasses.replace(
        manifests[0],
        text_column="; ".join(dict.fromkeys(manifest.text_column for manifest in manifests)),
        sources=[source for manifest in manifests for source in manifest.sources],
        counts=_sum_counts([manifest.counts for manifest in manifests]),
        checksums={},
        command=sys.argv,
        shard_bytes=None,
        where=_either([manifest.where for manifest in manifests]),
    )


def _either(wheres: Sequence[str | None]) -> str | None:
    """The condition that one of several was met; None where one is met by all records."""
    if None in wheres:
        return None
    distinct = list(dict.fromkeys(wheres))
    return distinct[0] if len(distinct) == 1 else " or ".join(f"({where})" for where in distinct)


def _sum_counts(counts: list[IndexCounts]) -> IndexCounts:
    """Numbers are added, those by reason for each reason."""
    total: dict[str, Any] = {}
    for field in dataclasses.fields(IndexCounts):
        values = [getattr(one, field.name) for one in counts]
        if field.name == "skipped":
            total[field.name] = dict(sum(map(Counter, values), Counter()))
        elif field.name == "sequences":  # only where they are not the documents
            has_sentences = any(value is not None for value in values)
            numbers = [one.documents if one.sequences is None else one.sequences for one in counts]
            total[field.name] = sum(numbers) if has_sentences else None
        else:
            total[field.name] = sum(values)
    return IndexCounts(**total)


def _is_finished(prefix: Path, manifest: Manifest | None) -> bool:
    """Whether this very merger is there. Raises UserError when something else is in its place."""
    existing = [path for suffix in _SUFFIXES if (path := Path(f"{prefix}{suffix}")).exists()]
    has_manifest = Manifest.path(prefix) in existing
    if not existing or (not has_manifest and is_publishing(prefix)):
        return False  # nothing there, or what a killed run was moving into place
    if has_manifest and manifest is not None:
        found = Manifest.read(prefix)
        if dataclasses.replace(manifest, checksums=found.checksums, command=found.command) == found:
            found.check_files(prefix)
            return True
    raise UserError(f"{existing[0]} exists and is no merger of these indices; choose another --output or remove it")


def _require_space(folder: Path, shards: list[Shard]) -> None:
    needed = sum(shard.num_bytes + 12 * shard.num_sequences + 8 * shard.num_documents for shard in shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder.parent}: the merger needs {needed:,} bytes and {free:,} are free; make room there")


def _copy_tokens(shards: list[Shard], target: Path, verify: bool) -> str:
    """Write the tokens of all shards one after the other; returns the checksum. Hashing runs in parallel with
    writing."""
    total = hashlib.sha256()
    buffer = memoryview(bytearray(_COPY_BYTES))
    with open(target, "wb", buffering=0, opener=no_links) as output, ThreadPoolExecutor(2) as threads:
        for shard in shards:
            own = hashlib.sha256()
            digests = [total, own] if verify and shard.manifest is not None else [total]
            path = Path(f"{shard.prefix}.bin")
            num_bytes = 0
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    hashing = [threads.submit(digest.update, buffer[:count]) for digest in digests]
                    _write(output, buffer[:count])
                    wait(hashing)
                    num_bytes += count
            if num_bytes != shard.num_bytes:
                raise UserError(f"{path}: its size changed while it was copied; merge when nobody writes it")
            if own in digests and shard.manifest and f"sha256:{own.hexdigest()}" != shard.manifest.checksums["bin"]:
                raise UserError(f"{path}: damaged: its checksum is not that of {shard.prefix}.json; index it again")
    return f"sha256:{total.hexdigest()}"


def _write(output: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[output.write(data) :]


def _write_idx(shards: list[Shard], target: Path) -> None:
    """Write the `.idx` of all shards: three tables, which grow side by side."""
    num_sequences = sum(shard.num_sequences for shard in shards)
    num_documents = sum(shard.num_documents for shard in shards)
    lengths_at, offsets_at = HEADER.size, HEADER.size + 4 * num_sequences
    bounds_at = offsets_at + 8 * num_sequences
    bytes_before = sequences_before = 0
    with open(target, "wb", buffering=0, opener=no_links) as file:
        output = file.fileno()
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[shards[0].dtype], num_sequences, num_documents + 1)
        os.pwrite(output, header, 0)
        bounds_at += os.pwrite(output, bytes(8), bounds_at)
        for shard in shards:
            reader = IndexReader(shard.prefix)
            check_structure(reader)
            for rows in row_chunks(shard.num_sequences):
                lengths_at += os.pwrite(output, reader.sequence_lengths[rows].tobytes(), lengths_at)
                offsets = reader.sequence_offsets[rows] + bytes_before
                offsets_at += os.pwrite(output, offsets.astype("<i8").tobytes(), offsets_at)
            for rows in row_chunks(shard.num_documents):
                ends = reader.document_bounds[rows.start + 1 : rows.stop + 1] + sequences_before
                bounds_at += os.pwrite(output, ends.astype("<i8").tobytes(), bounds_at)
            bytes_before += shard.num_bytes
            sequences_before += shard.num_sequences


def _summary(shards: list[Shard]) -> str:
    documents = sum(shard.num_documents for shard in shards)
    tokens = sum(shard.num_bytes for shard in shards) // numpy.dtype(shards[0].dtype).itemsize
    return f"{len(shards):,} indices, {documents:,} documents, {tokens:,} tokens"
