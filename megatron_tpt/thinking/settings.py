"""The settings of an augment run, kept beside its shards so that no other run is mixed in."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.thinking.options import AugmentOptions

SETTINGS_NAME = "augment.json"
FORMAT_VERSION = 1

_BLOCK_BYTES = 1 << 16
_MAX_BLOCKS = 64


def make_settings(options: AugmentOptions, files: Iterable[Path], template: str) -> dict[str, Any]:
    """Everything that decides what the shards hold. What only decides how fast they come is left out."""
    return {
        "format_version": FORMAT_VERSION,
        "input": [{"path": str(path), "fingerprint": file_fingerprint(path)} for path in files],
        "text_column": options.text_column,
        "id_column": options.id_column,
        "on_bad_record": options.on_bad_record,
        "limit": options.limit,
        "records_per_shard": options.records_per_shard,
        "model": options.model,
        "model_files": {path.name: file_fingerprint(path) for path in _model_files(options.model)},
        "dtype": options.dtype,
        "prompt": template,
        "max_document_tokens": options.max_document_tokens,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when `output` holds something else than a run with these settings."""
    path = output / SETTINGS_NAME
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the output")
    if not path.exists():
        if any(output.glob("part-*")):
            raise UserError(f"{output}: has shards but no {SETTINGS_NAME}; choose another --output")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); choose another --output") from error
    differing = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    if differing:
        changes = "; ".join(
            f"{name} was {_short(before.get(name))}, now {_short(settings.get(name))}" for name in differing
        )
        raise UserError(
            f"{output}: was begun with other settings ({changes}); set them back or choose another --output"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write_settings(output: Path, settings: dict[str, Any]) -> None:
    if not (output / SETTINGS_NAME).exists():
        with atomic_write(output / SETTINGS_NAME) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_fingerprint(path: Path) -> str:
    """A digest that tells a changed file at the cost of reading 4 MiB: of its size and of blocks spread evenly over it.

    Files up to 4 MiB are read whole. It finds other weights or another corpus under an old name, not a changed letter
    somewhere in a large file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8))
    num_blocks = -(-size // _BLOCK_BYTES)
    step = max(num_blocks / _MAX_BLOCKS, 1)
    with path.open("rb") as file:
        for i in range(min(num_blocks, _MAX_BLOCKS)):
            file.seek(int(i * step) * _BLOCK_BYTES)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _model_files(model: str) -> list[Path]:
    """What a model folder computes with; nothing for a Hub id."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    return sorted(path for pattern in patterns for path in Path(model).glob(pattern) if path.is_file())
