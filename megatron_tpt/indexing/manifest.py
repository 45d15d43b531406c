"""The manifest `PREFIX.json` next to an index: what it was made of, with what, and how to check that it is
whole.

It is written last: an index without it is not finished. The trainer reads it to refuse another tokenizer's
index.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from megatron_tpt.config.convert import from_json
from megatron_tpt.config.fields import NonNegativeInt, TokenId
from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum, write_json
from megatron_tpt.indexing.writer import idx_bytes
from megatron_tpt.jobs.settings import EntryChanges
from megatron_tpt.json_data import read_json

if TYPE_CHECKING:
    from megatron_tpt.indexing.tokenizer import Tokenizer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer an index was made with."""

    path: str
    fingerprint: str
    """ "sha256:" and the digest of its tokenizer.json."""
    vocab_size: int
    """The largest token id + 1."""
    eos_id: TokenId

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "TokenizerInfo":
        """What a manifest records about a tokenizer."""
        return cls(str(tokenizer.folder.resolve()), tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)


@dataclass(frozen=True)
class ThinkTokens:
    """The tokens before and after the thinking."""

    open: list[TokenId]
    close: list[TokenId]


@dataclass(frozen=True)
class Source:
    """One input file. The last three show whether it is still the same: the checksum is asked when the time differs."""

    path: str
    documents: int
    bytes: int
    modified_ns: int
    checksum: str

    def is_still(self, file: Path) -> bool:
        """Whether `file` is this source with the same content."""
        status = file.stat()
        return (
            self.path == str(file.resolve())
            and self.bytes == status.st_size
            and (self.modified_ns == status.st_mtime_ns or self.checksum == file_checksum(file))
        )


def compare_sources(before: Sequence[Source], now: Mapping[str, Path | None]) -> EntryChanges:
    """How an input differs from the `before` that was read. `now` is its files by name; None is no file, of which no
    more is known than its name."""
    known = {source.path: source for source in before}

    def is_still(name: str, file: Path | None) -> bool:
        return name in known and (file is None or known[name].is_still(file))

    return EntryChanges(
        [{"name": name, "fingerprint": name} for name in known],
        [{"name": name, "fingerprint": name if is_still(name, file) else f"not {name}"} for name, file in now.items()],
    )


@dataclass(frozen=True)
class IndexCounts:
    """`tokens` = `document_tokens` (with EOS) + `thinking_tokens` (with the tags)."""

    documents: NonNegativeInt
    documents_with_thinking: NonNegativeInt
    tokens: NonNegativeInt
    document_tokens: NonNegativeInt
    thinking_tokens: NonNegativeInt
    skipped: dict[str, NonNegativeInt]
    """Bad records skipped, by reason."""
    sequences: NonNegativeInt | None = None
    """Where a document may have several."""


def advice_without_index(prefix: Path) -> str:
    """What to do where no index has this prefix: often it is the name of a file."""
    if prefix.suffix in (".bin", ".idx", ".json") and Path(f"{prefix.with_suffix('')}.idx").is_file():
        return f"{prefix}: is a file of an index; give the prefix of its files, {prefix.with_suffix('')}"
    if prefix.is_file():
        return (
            f"{prefix}: is a file, not an index; make one of it with tools/index.py --input {prefix} --tokenizer "
            f"TOKENIZER_DIR --output PREFIX and give PREFIX (examples for fine-tuning go to megatron_tpt.finetune)"
        )
    return f"{prefix}.json: no such index; make it with tools/index.py --output {prefix}"


@dataclass(frozen=True)
class Manifest:
    """The content of `PREFIX.json`."""

    tokenizer: TokenizerInfo
    think: ThinkTokens
    join: str
    text_column: str
    dtype: str
    """Of the tokens in `.bin`: uint16 or int32."""
    sources: list[Source]
    counts: IndexCounts
    checksums: dict[str, str]
    """Of "bin" and "idx": "sha256:" and the digest."""
    command: list[str]
    append_eos: bool = True
    """Whether documents end with the end-of-sequence token."""
    parse_special_tokens: bool = False
    """Whether special tokens that occur in the raw text became these tokens."""
    shard_bytes: int | None = None
    """Of a shard: what the `.bin` files of its set were to keep to."""
    where: str | None = None
    """The condition on `meta` that selected the records; None where all were taken."""

    @property
    def may_have_thinking(self) -> bool:
        """Whether think tags can be among the tokens."""
        return self.counts.documents_with_thinking > 0 or self.parse_special_tokens

    @staticmethod
    def path(prefix: str | Path) -> Path:
        """Where the manifest of the index `prefix` is."""
        return Path(f"{prefix}.json")

    @classmethod
    def read(cls, prefix: str | Path) -> "Manifest":
        """Read `PREFIX.json`. Raises UserError when it is not there or not of a known version."""
        path = cls.path(prefix)
        try:
            status = path.stat()
            return _read_once(path, status.st_ino, status.st_size, status.st_mtime_ns)
        except FileNotFoundError:
            raise UserError(advice_without_index(Path(prefix))) from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not readable as an index manifest ({error})") from error

    def write(self, prefix: str | Path) -> None:
        """Write `PREFIX.json`, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(self.path(prefix), content, indent=1)

    def check_files(self, prefix: str | Path) -> None:
        """Raise UserError when `.bin` or `.idx` is missing or not as long as it must be. Cheap: no data is
        read.
        """
        if self.counts.documents == 0:
            raise UserError(f"{prefix}: holds no document; omit it, or index again")
        expected = {
            "bin": self.counts.tokens * numpy.dtype(self.dtype).itemsize,
            "idx": idx_bytes(self.counts.documents, self.counts.sequences),
        }
        for kind, num_bytes in expected.items():
            path = Path(f"{prefix}.{kind}")
            found = path.stat().st_size if path.is_file() else None
            if found != num_bytes:
                state = "is missing" if found is None else f"has {found} bytes, not {num_bytes}"
                raise UserError(f"{path} {state}; remove {self.path(prefix)} and index again")

    def check_idx(self, prefix: str | Path) -> None:
        """Raise UserError when `.idx` is not the one that was written with `.bin`. It is read whole: some 20 bytes for
        each document."""
        path = Path(f"{prefix}.idx")
        status = path.stat()
        found = _checksum_once(path, status.st_size, status.st_mtime_ns)
        if found != self.checksums.get("idx", found):
            raise UserError(
                f"{path}: damaged, or of another index: its checksum is not that of {self.path(prefix)}; index again"
            )

    def require_tokenizer(self, prefix: str | Path, fingerprint: str) -> None:
        """Raise UserError when the index was made with a tokenizer other than the one of this fingerprint."""
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{prefix}: indexed with another tokenizer (that of {self.tokenizer.path}); "
                "train with that one, or index again with yours"
            )


@functools.lru_cache(maxsize=1 << 16)
def _read_once(path: Path, inode: int, size: int, modified_ns: int) -> Manifest:
    """A manifest, read again only where it was written again: a run asks several times for each of thousands."""
    content = read_json(path)
    try:
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: manifest version {version!r}, this program knows {FORMAT_VERSION}; index again")
        manifest = from_json(Manifest, content)
        require_checksums(manifest.checksums, "bin", "idx")
        numpy.dtype(manifest.dtype)
        return manifest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index manifest ({error}); index again") from error


def require_checksums(checksums: Mapping[str, str], *kinds: str) -> None:
    """Raise ValueError unless there is a checksum of each of these files of an index."""
    if missing := sorted(set(kinds) - checksums.keys()):
        raise ValueError(f"no checksum of {', '.join(missing)}")


@functools.lru_cache(maxsize=1 << 16)
def _checksum_once(path: Path, size: int, modified_ns: int) -> str:
    """The checksum of a file, computed again only where it was written again."""
    return file_checksum(path)
