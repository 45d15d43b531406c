"""The settings of an augment run, kept beside its shards so that no other run is mixed in."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write, file_fingerprint
from megatron_tpt.records import Source, source_fingerprint
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import Template

SETTINGS_NAME = "augment.json"
FORMAT_VERSION = 2


def make_settings(options: AugmentOptions, sources: Sequence[Source], template: Template) -> dict[str, Any]:
    """Everything that decides what the shards hold. What only decides how fast they come is left out."""
    return {
        "format_version": FORMAT_VERSION,
        "input": [{"name": source.name, "fingerprint": source_fingerprint(source, len(sources))} for source in sources],
        "text_column": options.text_column,
        "id_column": options.id_column,
        "meta_columns": options.meta_columns,
        "on_bad_record": options.on_bad_record,
        "limit": options.limit,
        "records_per_shard": options.records_per_shard,
        "model": options.model,
        "model_files": {path.name: file_fingerprint(path) for path in _model_files(options.model)},
        "dtype": options.dtype,
        "api": options.api,
        "tokenizer": options.tokenizer,
        "prompt": {"name": template.name, "text": template.text, "wants": template.wants},
        "thinking_block": options.thinking_block,
        "open_tag": options.open_tag,
        "close_tag": options.close_tag,
        "max_document_tokens": options.max_document_tokens,
        "long_documents": options.long_documents,
        "text": options.text,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "rollouts": options.rollouts,
        "truncated": options.truncated,
        "filters": asdict(options.filters),
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


def _model_files(model: str) -> list[Path]:
    """What a model folder computes with; nothing for a Hub id."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    return sorted(path for pattern in patterns for path in Path(model).glob(pattern) if path.is_file())
