"""A tokenizer folder with a damaged file is refused in a short line that names the file, whoever loads it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, make_model

from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.training.model_files import special_token_ids

CONFIG, MAP, TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
LOADERS: dict[str, Callable[[Path], object]] = {
    "index": Tokenizer,
    "pack_sft": lambda folder: ChatTemplate(Tokenizer(folder)),
    "generation": lambda folder: load_tokenizer(str(folder)),
    "training": lambda folder: special_token_ids({}, folder),
}


def value(name: str, *keys: str, new: Any) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        content = holder = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = new
        (folder / name).write_text(json.dumps(content))
        return name

    return damage


def text(name: str, new: bytes) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / name).write_bytes(new)
        return name

    return damage


def truncated(folder: Path) -> str:
    os.truncate(folder / TOKENIZER, 700)
    return TOKENIZER


FOR_ALL = {
    "end token is a number": value(CONFIG, "eos_token", new=7),
    "end token is a list": value(CONFIG, "eos_token", new=[None]),
    "end token is half a character": value(CONFIG, "eos_token", new="\ud800"),
    "padding is a list": value(CONFIG, "pad_token", new=[]),
    "template is a number": value(CONFIG, "chat_template", new=1.5),
    "settings are a list": text(CONFIG, b"[]"),
    "settings are deep": text(CONFIG, b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"),
    "map is not whole": text(MAP, b'{"pad_token": "'),
    "map is no UTF-8": text(MAP, b'{"pad_token": "\xff"}'),
    "padding of the map is a number": text(MAP, b'{"pad_token": {"content": 7}}'),
    "added tokens are a list": text("added_tokens.json", b"[1]"),
    "tokenizer is not whole": truncated,
    "tokenizer is empty": text(TOKENIZER, b""),
    "id of a token is long": value(TOKENIZER, "model", "vocab", "a", new="y" * 100_000),
    "special is an object": value(TOKENIZER, "model", "vocab", "a", new={"a": [1, {}]}),
}
FOR_INDEXING = {"end token is long": value(CONFIG, "eos_token", new="y" * 100_000)}  # others make it a token
FOR_TRANSFORMERS = {
    "further tokens are a text": value(CONFIG, "additional_special_tokens", new="x"),
    "further token is an object": value(CONFIG, "additional_special_tokens", new=[{"a": [1, {}]}]),
    "further tokens by name are lists": value(CONFIG, "additional_special_tokens", new={"a": [1]}),
    "padding strips a number": value(CONFIG, "pad_token", new={"content": "a", "lstrip": 7}),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize("damage", [*FOR_ALL, *FOR_INDEXING, *FOR_TRANSFORMERS])
def test_a_damaged_file_of_a_tokenizer_is_named(damage: str, pristine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in pristine.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = (FOR_ALL | FOR_INDEXING | FOR_TRANSFORMERS)[damage](folder)
    others = ("index", "training") if damage in FOR_INDEXING else ("pack_sft", "generation")
    for loader in LOADERS if damage in FOR_ALL else others:
        with pytest.raises(UserError) as refusal:
            LOADERS[loader](folder)
        assert name in str(refusal.value) and str(folder) in str(refusal.value), loader
        assert len(str(refusal.value)) < 600 + len(str(folder)), loader


def test_a_setting_that_only_encoding_reads_is_refused(pristine: Path, tmp_path: Path) -> None:
    for path in pristine.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    value(CONFIG, "model_max_length", new=[None])(tmp_path)
    with pytest.raises(UserError, match=CONFIG):
        load_tokenizer(str(tmp_path))
