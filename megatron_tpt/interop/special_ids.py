"""The special tokens that a model's files name: config.json, generation_config.json and the tokenizer's own."""

from pathlib import Path
from typing import Any

from megatron_tpt.indexing.tokenizer import CONFIG, EOS_FILES, Tokenizer
from megatron_tpt.json_data import pretty, read_object
from megatron_tpt.training.model_files import (
    GENERATION_CONFIG,
    HF_CONFIG,
    History,
    special_token_ids,
    with_end_ids,
    without_none,
)


def exported_settings(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The special token ids of config.json and the content of generation_config.json for the export of a checkpoint.

    Both name what the imported model named, where there was one, else what the tokenizer names. After training that
    includes the tokens that end a turn of the chats it was fine-tuned on, and the one that ended its documents.
    """
    tokenizer, history = checkpoint / "tokenizer", History.read(checkpoint)
    end_of_documents = Tokenizer(tokenizer).eos_id
    learned = [*history.end_of_turn_ids, *([end_of_documents] if history.longest_sequence else [])]
    ids = special_token_ids(read_object(checkpoint / HF_CONFIG), tokenizer)
    ids["eos_token_id"] = with_end_ids(ids["eos_token_id"], learned)
    generation = read_object(checkpoint / GENERATION_CONFIG) or without_none(ids)
    ends = generation.get("eos_token_id")
    ends = with_end_ids(ids["eos_token_id"] if ends is None else ends, learned)
    return ids, {**generation, "eos_token_id": ends}


def eos_token_of_chats(checkpoint: Path) -> str | None:
    """The token that a fine-tuned model's tokenizer must name as its end, for programs that know no other: None where
    the tokenizer's own is already one that ends a turn, or none is known."""
    turns = History.read(checkpoint).end_of_turn_ids
    tokenizer = Tokenizer(checkpoint / "tokenizer")
    return None if not turns or tokenizer.eos_id in turns else tokenizer.decode(turns[:1])


def set_eos_token(folder: Path, token: str) -> None:
    """Have a tokenizer folder name another end-of-sequence token, wherever it names one."""
    for name in EOS_FILES:
        content = read_object(folder / name)
        if name == CONFIG or "eos_token" in content:
            content["eos_token"] = token
            (folder / name).write_bytes(pretty(content))
