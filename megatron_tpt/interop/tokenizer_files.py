"""The tokenizer of a Hugging Face folder: which files it is, and the ids a model's config.json names."""

import json
import shutil
from pathlib import Path

import tokenizers

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.tokenizer import Tokenizer

# What a model folder may hold besides is weights and settings of the model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of `source`, and nothing else that is there, into `target`, made when it is missing.

    Raises UserError when `source` has no tokenizer.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"{source}: no tokenizer.json; make one: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        )
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


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
