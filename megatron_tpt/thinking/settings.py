"""The settings of an augment run: what decides what its shards hold."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tpt.files import file_fingerprint
from megatron_tpt.job_settings import describe_inputs
from megatron_tpt.records import Source
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import Template

SETTINGS_NAME = "augment.json"
FORMAT_VERSION = 2


def make_settings(options: AugmentOptions, sources: Sequence[Source], template: Template) -> dict[str, Any]:
    """Everything that decides what the shards hold. What only decides how fast they come is left out."""
    return {
        "format_version": FORMAT_VERSION,
        "input": describe_inputs(options.output / SETTINGS_NAME, sources),
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


def _model_files(model: str) -> list[Path]:
    """What a model folder computes with; nothing for a Hub id."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    return sorted(path for pattern in patterns for path in Path(model).glob(pattern) if path.is_file())
