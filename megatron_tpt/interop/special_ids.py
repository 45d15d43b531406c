"""The special tokens that a model's files name: config.json, generation_config.json and the tokenizer's own."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.training.model_files import GENERATION_CONFIG, HF_CONFIG, History, read_json, with_end_ids

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_token_ids(folder: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id as a tokenizer folder names them; None where it names none."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: dict[str, Any] = {}
    for kind in ("bos", "pad"):
        tokens = [read_json(folder / name).get(f"{kind}_token") for name in _TOKENIZER_FILES]
        names = [token["content"] if isinstance(token, dict) else token for token in tokens]
        name = next(filter(None, names), None)
        ids[f"{kind}_token_id"] = None if name is None else backend.token_to_id(name)
    return {**ids, "eos_token_id": Tokenizer(folder).eos_id}


def exported_settings(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The special token ids of config.json and the content of generation_config.json for the export of a checkpoint.

    Both name what the imported model named, where there was one, else what the tokenizer names. After training that
    includes the tokens that end a turn of the chats it was fine-tuned on, and the one that ended its documents.
    """
    own, original = tokenizer_token_ids(checkpoint / "tokenizer"), read_json(checkpoint / HF_CONFIG)
    history = History.read(checkpoint)
    learned = [*history.end_of_turn_ids, *([own["eos_token_id"]] if history.longest_sequence else [])]
    ids = {name: original[name] for name in own if name in original} if original else dict(own)
    ids["eos_token_id"] = with_end_ids(original, own["eos_token_id"], learned)
    generation = read_json(checkpoint / GENERATION_CONFIG)
    ends = with_end_ids(generation, ids["eos_token_id"], learned)
    generation = generation or {name: id for name, id in ids.items() if id is not None}
    return ids, {**generation, "eos_token_id": ends}


def eos_token_of_chats(checkpoint: Path) -> str | None:
    """The token that a fine-tuned model's tokenizer must name as its end, for programs that know no other: None where
    the tokenizer's own is already one that ends a turn, or none is known."""
    turns = History.read(checkpoint).end_of_turn_ids
    tokenizer = Tokenizer(checkpoint / "tokenizer")
    return None if not turns or tokenizer.eos_id in turns else tokenizer.decode(turns[:1])


def set_eos_token(folder: Path, token: str) -> None:
    """Have a tokenizer folder name another end-of-sequence token, wherever it names one."""
    for name in _TOKENIZER_FILES:
        content = read_json(folder / name)
        if name == _TOKENIZER_FILES[0] or "eos_token" in content:
            content["eos_token"] = token
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
