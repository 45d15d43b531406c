"""The manifests of the indices that a run trains on together, packed ones among them."""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import IndexCounts, Manifest
from megatron_tpt.indexing.pack_manifest import PackManifest, packed_as_index


def read_manifests(prefixes: Iterable[str | Path]) -> list[Manifest]:
    """The manifests of indices to train on together, also of packed ones (see `PackedSource`).

    Raises UserError when one is missing or damaged (of `.bin` the size is compared, of `.idx` the checksum too), when
    its documents are split into sentences, or when they were made with different tokenizers, end-of-sequence tokens or
    think tags.
    """
    manifests: list[Manifest] = []
    for prefix in prefixes:
        manifest = _source_manifest(prefix)
        manifest.check_files(prefix)
        if os.environ.get("RANK", "0") == "0":  # for all ranks of a training run
            manifest.check_idx(prefix)
        _require_whole_documents(prefix, manifest.counts)
        if manifests:
            manifest.require_tokenizer(prefix, manifests[0].tokenizer.fingerprint)
            _require_same_ids(prefix, manifest, manifests[0])
        manifests.append(manifest)
    return manifests


def _source_manifest(prefix: str | Path) -> Manifest:
    is_packed = PackManifest.path(prefix).exists() and not Manifest.path(prefix).exists()
    return packed_as_index(prefix) if is_packed else Manifest.read(prefix)


def _require_whole_documents(prefix: str | Path, counts: IndexCounts) -> None:
    # Megatron Core's GPTDataset takes every sequence for a document, and shuffles them.
    if counts.sequences not in (None, counts.documents):
        raise UserError(
            f"{prefix}: its documents are split into sentences, which training would shuffle: index again without "
            f"--sentences"
        )


def _require_same_ids(prefix: str | Path, manifest: Manifest, first: Manifest) -> None:
    for what, ours, theirs in (
        ("end-of-sequence token", manifest.tokenizer.eos_id, first.tokenizer.eos_id),
        ("think tags", manifest.think, first.think),
    ):
        if ours != theirs:
            raise UserError(
                f"{prefix}: its {what} ({ours}) is not that of the other data ({theirs}), although tokenizer.json is: "
                f"index one of them again with the other's tokenizer folder ({manifest.tokenizer.path}, "
                f"{first.tokenizer.path})"
            )
