"""An indexing job: its settings, and whether what is there already is this job's, finished or to be resumed."""

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.indexing import sentences
from megatron_tpt.indexing.encoders import Encoder, choose_encoder
from megatron_tpt.indexing.journal import Journal, working_path
from megatron_tpt.indexing.manifest import IndexCounts, Manifest, ThinkTokens, TokenizerInfo, compare_sources
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.originals import check_against_original, has_original
from megatron_tpt.indexing.pieces import PieceMaker
from megatron_tpt.indexing.sample import sample_texts
from megatron_tpt.indexing.selection import Selection
from megatron_tpt.indexing.shard_sets import shard_prefix
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.writer import token_dtype
from megatron_tpt.jobs.settings import EntryChanges, describe_changes, require_apart
from megatron_tpt.names import counted
from megatron_tpt.records import Columns, expand_sources
from megatron_tpt.records import Source as Input
from megatron_tpt.records.where import Where
from megatron_tpt.units import num_bytes

logger = logging.getLogger(__name__)

_SHARD_SIZE = "--shard-size in bytes"


class IndexJob:
    """The settings of one run and what follows from them."""

    def __init__(self, options: IndexOptions) -> None:
        self.options = options
        self.columns = Columns(options.text_column, options.id_column)
        self.inputs = expand_sources(options.input)
        files = [input.path for input in self.inputs if input.path]
        require_apart(options.output, options.input, files, is_prefix=True)
        self.tokenizer = Tokenizer(options.tokenizer, parse_special_tokens=options.parse_special_tokens)
        self.shard_bytes = num_bytes("--shard-size", options.shard_size) if options.shard_size else None
        split = sentences.split if options.sentences else None
        self.where = Where(options.where) if options.where is not None else None
        self.maker = PieceMaker(self.columns, options.join, options.on_bad_record, split, Selection(self.where))
        self.template = Manifest(
            tokenizer=TokenizerInfo.of(self.tokenizer),
            think=ThinkTokens(self.tokenizer.open_ids, self.tokenizer.close_ids),
            join=options.join.value,
            text_column=options.text_column,
            dtype=token_dtype(self.tokenizer.vocab_size),
            sources=[],
            counts=IndexCounts(0, 0, 0, 0, 0, {}),
            checksums={},
            command=sys.argv,
            append_eos=options.append_eos,
            parse_special_tokens=options.parse_special_tokens,
            shard_bytes=self.shard_bytes,
            where=options.where,
        )

    def finished(self) -> list[Manifest] | None:
        """The manifests of this very index when it exists. Raises UserError when something else is in its place."""
        prefix = self.options.output
        if Journal.read(working_path(prefix)).is_complete:
            return None  # it remains to be moved to its name
        found = self._existing_prefixes()
        if not found:
            return None
        advice = f"choose another --output or remove {self._names()}"
        if foreign := [existing for existing in found if not Manifest.path(existing).exists()]:
            raise UserError(f"{foreign[0]}.bin or .idx exists and was not made by this program; {advice}")
        manifests = [Manifest.read(existing) for existing in found]
        settings, input = self._differences(manifests)
        if input.only_added and not settings:
            advice = (
                "index the new files alone with another --output and join both with tools/merge_index.py, "
                f"or {advice} to index all again"
            )
        if differences := [*settings, *_input_phrase(input)]:
            raise UserError(
                f"{prefix}: was indexed before with other settings or input ({'; '.join(differences)}); {advice}"
            )
        for existing, manifest in zip(found, manifests, strict=True):
            manifest.check_files(existing)
        return manifests

    def _existing_prefixes(self) -> list[Path]:
        """Of the index, or of the shards of the set, that is there. Raises UserError for a set that is not whole."""
        prefix = self.options.output
        if self.shard_bytes is None:
            return [prefix] if any(Path(f"{prefix}.{kind}").exists() for kind in ("json", "bin", "idx")) else []
        pattern = f"{prefix.name}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].*"
        found = sorted({path.with_suffix("") for path in prefix.parent.glob(pattern)})
        num_shards = int(found[-1].name[-5:]) if found else 0
        expected = [shard_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
        if unexpected := sorted({*found} ^ {*expected}):
            state = "is of another set" if unexpected[0] in found else "is missing"
            raise UserError(
                f"{prefix} is no whole set of {num_shards} shards: {unexpected[0]} {state}; "
                f"choose another --output or remove {self._names()}"
            )
        return found

    def _names(self) -> str:
        """A shell pattern for the files of this very index: PREFIX* would match those of PREFIX2 and PREFIX-eval."""
        shards = "" if self.shard_bytes is None else "-?????-of-?????"
        return f"{self.options.output}{shards}.{{bin,idx,json}}"

    def _differences(self, manifests: Sequence[Manifest]) -> tuple[list[str], EntryChanges]:
        """How existing indices differ from what this job would make: settings, and the input."""
        first, wanted = manifests[0], self._settings()
        found = {
            "tokenizer": first.tokenizer.fingerprint,
            "end-of-sequence token": first.tokenizer.eos_id,
            "join": first.join,
            "text column": first.text_column,
            "choice of --append-eos": first.append_eos,
            "choice of --sentences": first.counts.sequences is not None,
            "choice of --parse-special-tokens": first.parse_special_tokens,
            "--where": first.where,
            # Manifests of earlier versions do not say.
            _SHARD_SIZE: self.shard_bytes if first.shard_bytes is None else first.shard_bytes,
        }
        sources = {source.path: source for manifest in manifests for source in manifest.sources}
        wanted = {name: wanted[name] for name in found}
        return list(describe_changes(found, wanted, as_text=str)), compare_sources(
            [*sources.values()], _files_by_name(self.inputs)
        )

    def _settings(self) -> dict[str, Any]:
        """What the output depends on in addition to the inputs, by the names used in messages."""
        options = self.options
        return {
            "tokenizer": self.template.tokenizer.fingerprint,
            "end-of-sequence token": self.template.tokenizer.eos_id,
            "join": options.join.value,
            "text column": options.text_column,
            "id column": options.id_column,
            "choice of --append-eos": options.append_eos,
            "choice of --sentences": options.sentences,
            "choice of --parse-special-tokens": options.parse_special_tokens,
            "--where": options.where,
            _SHARD_SIZE: self.shard_bytes,
        }

    def journal(self, folder: Path) -> Journal:
        """The journal to resume from. Raises UserError when it is that of other settings or inputs.

        Without a finished input there is nothing to resume from: what was left behind is removed.
        """
        journal, settings, inputs = Journal.read(folder), self._settings(), self.inputs
        done = [entry.source for entry in journal.sources]
        if not journal.is_complete:
            settings["--tokenizer-backend"] = self.encoder.name
            known = {source.path for source in done}  # what comes after these is still to be read
            inputs = [input for i, input in enumerate(inputs) if i < len(done) or manifest_name(input) in known]
        if not done:
            for leftover in folder.iterdir():
                leftover.unlink()
            return Journal(journal.path, settings)
        input = compare_sources(done, _files_by_name(inputs))
        before = {name: journal.settings.get(name) for name in settings}
        if differences := [*describe_changes(before, settings, as_text=str), *_input_phrase(input)]:
            raise UserError(
                f"{self.options.output}: an unfinished run has indexed {counted(len(done), 'input file')} with other "
                f"settings or input ({'; '.join(differences)}); restore them to resume, or choose another --output, or "
                f"remove {folder}"
            )
        if not journal.is_complete:
            logger.info(f"resuming after {len(done)} of {counted(len(self.inputs), 'input')}")
        return journal

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of texts. Raises UserError where it disagrees with the tokenizer's files."""
        options = self.options
        original = has_original(self.tokenizer.folder)
        needs_sample = original or options.tokenizer_backend != "reference"
        sample = sample_texts(self.inputs, self.columns) if needs_sample else []
        if original:
            check_against_original(self.tokenizer, sample)
        return choose_encoder(self.tokenizer, options.tokenizer_backend, sample, options.worker_count)


def manifest_name(input: Input) -> str:
    """What the manifest calls an input."""
    return str(input.real_path) if input.real_path else input.name


def _files_by_name(inputs: Sequence[Input]) -> dict[str, Path | None]:
    """Where the inputs are, by the names that manifests give them."""
    return {manifest_name(input): input.path for input in inputs}


def _input_phrase(input: EntryChanges) -> list[str]:
    """The difference of an input as one phrase; none where there is no difference."""
    return [f"input: {phrase}"] if (phrase := input.describe()) else []
