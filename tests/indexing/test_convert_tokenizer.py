"""Tokenizers of SentencePiece and tiktoken become Hugging Face folders that give the same tokens, or nothing."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from indexing_inputs import generated_text
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.convert_tokenizer import LLAMA3_PATTERN, convert_tokenizer
from megatron_tpt.indexing.encoders import NASTY_TEXTS
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import ConvertTokenizerOptions, IndexOptions
from megatron_tpt.indexing.originals import import_optional, tiktoken_encoder
from megatron_tpt.indexing.tokenizer import Tokenizer

TEXTS = [*(generated_text(i, 40) for i in range(200)), "a b  c\n\n d"]
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def train_sentencepiece(folder: Path, **settings: object) -> Path:
    (folder / "texts").write_text("\n".join(TEXTS))
    path = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(path),
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return path.with_suffix(".model")


@pytest.mark.parametrize(
    "settings", [{"add_dummy_prefix": True}, {"add_dummy_prefix": False, "user_defined_symbols": ["koritheung"]}]
)
def test_a_sentencepiece_model_gives_the_same_tokens(settings: dict, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **LLAMA, **settings)
    output = convert_tokenizer(ConvertTokenizerOptions(model, tmp_path / "out"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer(output)
    for text in [*TEXTS, "koritheung a koritheung"]:
        tokens = tokenizer.encode(text)
        assert tokens == processor.encode(text)
        assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_id == processor.eos_id()
    assert (output / "tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {**LLAMA, "user_defined_symbols": ["koritheung"]}])
def test_a_model_that_hugging_face_tokenizers_cannot_follow_is_refused(settings: dict, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **settings)
    with pytest.raises(UserError, match="cannot give its tokens: they differ on"):
        convert_tokenizer(ConvertTokenizerOptions(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def write_tiktoken(tokenizer_dir: Path, path: Path) -> None:
    """The bytes and merges of a byte-level tokenizer in tiktoken's format."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    encoder = {character: byte for byte, character in bytes_to_unicode().items()}
    merged = ["".join(merge) for merge in content["model"]["merges"]]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(encoder[character] for character in name) for name in dict.fromkeys(merged)]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def test_a_tiktoken_file_gives_the_same_tokens(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.tiktoken"
    write_tiktoken(tokenizer_dir, path)
    options = ConvertTokenizerOptions(path, tmp_path / "out", special_tokens=["<|start|>", "<|end|>"])
    with pytest.raises(UserError, match="names no end-of-sequence token: give --eos-token"):
        convert_tokenizer(options)
    tokenizer = Tokenizer(convert_tokenizer(replace(options, eos_token="<|end|>")))
    encode = tiktoken_encoder(path, LLAMA3_PATTERN)
    for text in [*TEXTS, *NASTY_TEXTS[:17]]:
        assert tokenizer.encode(text) == encode(text)
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == len(path.read_text().splitlines()) + 1


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_indexing_compares_the_input_with_the_original(kind: str, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "some.tiktoken"
    if kind == "tiktoken":
        write_tiktoken(tokenizer_dir, path)
    else:
        path = train_sentencepiece(tmp_path, **LLAMA)
    folder = convert_tokenizer(ConvertTokenizerOptions(path, tmp_path / "out", eos_token="</s>"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for backend in ("auto", "reference"):
        index(IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / backend, tokenizer_backend=backend))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:50]
    content["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    options = IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / "x", tokenizer_backend="reference")
    with pytest.raises(UserError, match=r"tokenizer\.json and tokenizer\.model disagree on"):
        index(options)
    (folder / "tokenizer.model").write_bytes(b"neither")
    index(options)
    assert "is not compared with it" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x needs the package no_such_package: pip install"):
        import_optional("no_such_package", "x")
    with pytest.raises(UserError, match=r"holds 0 files"):
        convert_tokenizer(ConvertTokenizerOptions(tmp_path, tmp_path / "out"))
