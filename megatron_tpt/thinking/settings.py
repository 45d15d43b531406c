"""The settings of an augment run: what decides what its shards hold."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint
from megatron_tpt.jobs.settings import check_settings, describe_inputs, read_settings
from megatron_tpt.json_data import read_json
from megatron_tpt.records import Source
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import Template
from megatron_tpt.thinking.shards import SETTINGS_NAME, Output

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


def make_settings(options: AugmentOptions, sources: Sequence[Source], template: Template) -> dict[str, Any]:
    """Everything that decides what the shards hold. What only affects the speed is omitted."""
    before = read_settings(options.output / SETTINGS_NAME) or {}
    return {
        "format_version": FORMAT_VERSION,
        "input": describe_inputs(options.output / SETTINGS_NAME, sources),
        "text_column": options.text_column,
        "id_column": options.id_column,
        "meta_columns": options.meta_columns,
        # As the job began: the shards of a job that stops at bad records are those of one that rejects them.
        "on_bad_record": before.get("on_bad_record", options.on_bad_record),
        "limit": options.limit,
        "records_per_shard": options.rows_per_shard,  # the name in the settings of all versions
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
        # Absent where they are not given, as from jobs that were begun before there were any.
        **({"request_fields": options.request_fields()} if options.request_field else {}),
        **({"length_field": options.length_field} if options.length_field != "max_tokens" else {}),
        **({"omit_fields": sorted(options.omitted())} if options.omit_fields else {}),
    }


def check_job(output: Output, settings: dict[str, Any]) -> None:
    """Raise UserError when the folder of `output` holds a job with other settings, or one whose filters are being
    changed. A job without any results may be begun with others."""
    path = output.settings_path
    if output.refilter_mark.exists():
        raise UserError(
            f"{output.folder}: --refilter was interrupted here; run it again to its end before the job is resumed"
        )
    differing = differing_settings(path, settings)
    if differing == ["filters"] and not output.is_blank():
        raise UserError(
            f"{output.folder}: was begun with other --filters; give the same ones, or apply those of now to what was "
            "generated with --refilter"
        )
    if differing and output.is_blank():
        logger.info(f"{output.folder}: the earlier settings have no results; they are replaced")
        output.clear_journals()
        path.unlink()
    check_settings(path, settings)


def differing_settings(path: Path, settings: dict[str, Any]) -> list[str]:
    """The names of settings that differ in the file `path`; none where there is no such file."""
    try:
        before = read_json(path)
    except (OSError, ValueError):  # `check_settings` says so
        return []
    return [name for name in {**settings, **before} if settings.get(name) != before.get(name)]


def _model_files(model: str) -> list[Path]:
    """What a model folder computes with; nothing for a Hub id."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    return sorted(path for pattern in patterns for path in Path(model).glob(pattern) if path.is_file())
