"""The manifest of a packed index, `PREFIX.sft.json`: what was packed, how, and what came of it.

It is written last: without it the index is not finished.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import from_json
from megatron_tpt.config.fields import TokenId
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.indexing.manifest import (
    IndexCounts,
    Manifest,
    Source,
    ThinkTokens,
    TokenizerInfo,
    require_checksums,
)
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.json_data import read_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackSettings:
    """What decides, with the input, every byte of a packed index."""

    tokenizer_fingerprint: str
    eos_id: int
    """The token after a response."""
    columns: tuple[str, ...]
    """The messages, or the prompt and the response."""
    chat_template: str | None
    """Checksum of the chat template and the special tokens it is given; none for prompts and responses."""
    date: str | None
    """What the chat template took for today."""
    sequence_length: int
    """Of the model's inputs; a row holds one token more, the last label."""
    on_too_long: str
    on_bad_example: str
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template of all conversations."""
    tools_column: str = "tools"
    inline_reasoning: bool = False
    ignore_fields: tuple[str, ...] = ()
    where: str | None = None
    """The condition on `meta` that selected the records; None where all were taken."""


@dataclass(frozen=True)
class PackCounts:
    """What is in a packed index, and what is not."""

    examples: int
    rows: int
    fewest_rows: int
    """A lower bound for any packing: tokens over the length of a row, rounded up."""
    tokens: int
    loss_tokens: int
    truncated: int
    """Examples that were truncated to the length of a row; they are among `examples`."""
    skipped: dict[str, int]
    """Records that were skipped, by reason."""
    skipped_example: dict[str, str] = field(default_factory=dict)
    """The first of them by reason: its place, and what is wrong with it."""

    def efficiency(self, sequence_length: int) -> float:
        """The share of the rows' places that hold a token."""
        return self.tokens / (self.rows * (sequence_length + 1))


@dataclass(frozen=True)
class PackManifest:
    """The content of `PREFIX.sft.json`."""

    settings: PackSettings
    tokenizer: TokenizerInfo
    sources: list[Source]
    counts: PackCounts
    efficiency: float
    """The share of the rows' places that hold a token."""
    loss_mask: str
    """How it was found: generation spans, prefixes, or response."""
    checksums: dict[str, str]
    """Of "bin", "idx" and "sft": "sha256:" and the digest."""
    command: list[str]
    tokenizer_checksums: dict[str, str] = field(default_factory=dict)
    """The same of the files in `PREFIX.tokenizer`, by name; none where an earlier version packed, which made no such
    folder."""
    end_of_turn_ids: list[TokenId] = field(default_factory=list)
    """The special tokens that end a learned turn, the most frequent first; none where an earlier version packed."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables that the chat template was given for all conversations."""

    @staticmethod
    def tokenizer_path(prefix: str | Path) -> Path:
        """Where the packed index `prefix` keeps its tokenizer."""
        return Path(f"{prefix}.tokenizer")

    @staticmethod
    def path(prefix: str | Path) -> Path:
        """Where the manifest of the packed index `prefix` is."""
        return Path(f"{prefix}.sft.json")

    @classmethod
    def read(cls, prefix: str | Path) -> "PackManifest":
        """Read `PREFIX.sft.json`. Raises UserError when it is not there or not of a known version."""
        path = cls.path(prefix)
        try:
            content = read_json(path)
            if (version := content.pop("format_version")) != FORMAT_VERSION:
                raise UserError(f"{path}: version {version!r}, this program knows {FORMAT_VERSION}; pack again")
            manifest = from_json(cls, content)
            require_checksums(manifest.checksums, "bin", "idx", "sft")
            return manifest
        except FileNotFoundError:
            raise UserError(f"{path}: no such packed index; make it with tools/pack_sft.py --output {prefix}") from None
        except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not readable as the manifest of a packed index ({error}); pack again") from error

    def require(self, prefix: str | Path, fingerprint: str, sequence_length: int) -> None:
        """Raise UserError unless the index was packed with this tokenizer and for this length."""
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{prefix}: packed with another tokenizer (that of {self.tokenizer.path}): fine-tune with that one "
                f"(data.tokenizer), or pack again with yours"
            )
        if sequence_length != self.settings.sequence_length:
            raise UserError(
                f"{prefix}: packed for training.sequence_length={self.settings.sequence_length}, not "
                f"{sequence_length}: change it, or pack again with --sequence-length {sequence_length}"
            )

    def write(self, prefix: str | Path) -> None:
        """Write `PREFIX.sft.json`, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(self.path(prefix), content, indent=1)


@dataclass(frozen=True)
class PackedSource(Manifest):
    """A packed index as a source of pre-training, whose loss is on what is learned of it."""

    learned_tokens: int = 0

    @property
    def may_have_thinking(self) -> bool:
        """Answers may hold thoughts; they are not counted."""
        return True


def packed_as_index(prefix: str | Path) -> PackedSource:
    """What a packed index is as an indexed dataset: its rows are documents. Raises UserError when it cannot be read."""
    from megatron_tpt.indexing.tokenizer import Tokenizer

    packed = PackManifest.read(prefix)
    if not (folder := PackManifest.tokenizer_path(prefix)).is_dir():
        raise UserError(f"{prefix}: packed by an earlier version, without its tokenizer: pack again to pre-train on it")
    tokenizer, counts = Tokenizer(folder), packed.counts
    return PackedSource(
        tokenizer=packed.tokenizer,
        think=ThinkTokens(tokenizer.open_ids, tokenizer.close_ids),
        join="packed",
        text_column=",".join(packed.settings.columns),
        dtype=IndexReader(prefix).dtype.name,
        sources=packed.sources,
        counts=IndexCounts(counts.rows, 0, counts.tokens, counts.tokens, 0, counts.skipped),
        checksums={kind: packed.checksums[kind] for kind in ("bin", "idx", "sft")},
        command=packed.command,
        append_eos=packed.settings.chat_template is None,
        learned_tokens=counts.loss_tokens,
    )


def is_packed(paths: Iterable[Path]) -> bool:
    """Whether these are prefixes of packed indices, rather than files of examples. Raises UserError for a mixture."""
    packed = [PackManifest.path(path).exists() for path in paths]
    if any(packed) and not all(packed):
        raise UserError(
            "data.train mixes packed indices with other files: pack these too (tools/pack_sft.py), or omit them"
        )
    return any(packed)
