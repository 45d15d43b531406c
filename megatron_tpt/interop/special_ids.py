"""The ids of special tokens that a model's config.json names."""

import json
from pathlib import Path

import tokenizers

from megatron_tpt.indexing.tokenizer import Tokenizer


def begin_and_end_ids(folder: Path) -> tuple[int | None, int]:
    """The ids of the begin- and the end-of-sequence token; the former is None when the tokenizer names none."""
    end = Tokenizer(folder).eos_id
    config = folder / "tokenizer_config.json"
    begin = json.loads(config.read_text()).get("bos_token") if config.is_file() else None
    if isinstance(begin, dict):
        begin = begin["content"]
    if begin is None:
        return None, end
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(begin), end
