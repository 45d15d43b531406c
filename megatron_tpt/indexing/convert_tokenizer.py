"""A SentencePiece model, a tiktoken file or a tekken.json as a Hugging Face folder: `tools/convert_tokenizer.py`.

The folder is written only when its tokenizer gives exactly the tokens of the original, on texts that are known to
trip tokenizers up and on a sample given by the user.
"""

import importlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory
from megatron_tpt.indexing.encoders import NASTY_TEXTS
from megatron_tpt.indexing.options import ConvertTokenizerOptions
from megatron_tpt.indexing.originals import (
    ORIGINAL,
    TEKKEN,
    Encode,
    first_difference_from,
    import_optional,
    is_tiktoken,
    sentencepiece_encoder,
    tekken_encoder,
    tiktoken_encoder,
)
from megatron_tpt.indexing.tekken import EOS as TEKKEN_EOS
from megatron_tpt.indexing.tekken import Tekken
from megatron_tpt.indexing.tokenizer import CONFIG, TOKENIZER_FILES, Tokenizer, find_originals
from megatron_tpt.jobs.settings import require_absent
from megatron_tpt.json_data import pretty
from megatron_tpt.logs import print_result
from megatron_tpt.records import read_records

logger = logging.getLogger(__name__)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE_DOCUMENTS = 1000
_SPACE = "\u2581"  # what SentencePiece writes for a space
# Code points that are no characters, so that no text holds them; without two that mark special tokens in chats.
_STAND_INS = [
    *map(chr, range(0xFDD2, 0xFDF0)),
    *(chr(0x10000 * n + low) for n in range(1, 16) for low in (0xFFFE, 0xFFFF)),
]


def convert_tokenizer(options: ConvertTokenizerOptions) -> Path:
    """Write `options.output` and return it. Raises UserError for what cannot be converted to give the same tokens, and
    for an output that exists; then nothing is there."""
    path = _find_original(options.input)
    require_absent(options.output)
    original = _open(path, options)
    backend = original.backend
    edge_cases = _edge_cases(backend, original.user_defined)
    sample = read_records(options.sample, limit=_SAMPLE_DOCUMENTS, advice="fix the line") if options.sample else []
    texts = [record.text for record in sample]
    with atomic_directory(options.output) as folder:
        _write(folder, path, original, options.eos_token)
        text = first_difference_from(original.encode, Tokenizer(folder), [*edge_cases, *texts])
        if text is not None:
            raise UserError(
                f"{path}: Hugging Face tokenizers cannot give its tokens: they differ on {text[:60]!r}; take the "
                f"tokenizer.json that the model's authors offer, if there is one, and compare it on your own texts"
            )
    compared = f"{len(edge_cases)} edge cases" + (f" and {len(texts)} documents" if texts else "")
    print_result(f"{options.output}: {backend.get_vocab_size():,} tokens; on {compared} they are those of {path}")
    return options.output


def _edge_cases(backend: tokenizers.Tokenizer, names: Sequence[str]) -> list[str]:
    """Texts that are known to trip tokenizers up, and the symbols that are always one token in several places."""
    symbols = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    return [*NASTY_TEXTS, "\n".join(NASTY_TEXTS), *map(_around, [*symbols, *names])]


def _around(symbol: str) -> str:
    return f"{symbol}a {symbol} b{symbol}{symbol}  {symbol[:-1]}{symbol}{symbol[1:]}"


def _find_original(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return path
    found = find_originals(path)
    if not found:
        ready = "; its tokenizer.json needs no conversion" if (path / "tokenizer.json").is_file() else ""
        raise UserError(f"{path}: holds no tekken.json, *.model, *.model.v3, ... or *.tiktoken{ready}")
    others = [file for file in found[1:] if file.read_bytes() != found[0].read_bytes()]
    others += [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
    if others:
        names = ", ".join(file.name for file in others)
        logger.info(f"{path}: converting {found[0].name}, not {names}; name another file with --input")
    return found[0]


class _Original(NamedTuple):
    """A tokenizer of another format, and the same as Hugging Face tokenizers have it."""

    encode: Encode
    backend: tokenizers.Tokenizer
    name: str
    """Under which it is kept next to tokenizer.json."""
    eos: str | None = None
    """The end-of-sequence token that it names itself."""
    user_defined: Sequence[str] = ()
    """Symbols that are always one token."""


def _open(path: Path, options: ConvertTokenizerOptions) -> _Original:
    """Raises UserError for a file of another kind, and for options that have no effect on its kind."""
    is_json = path.suffix == ".json"
    if not is_json and is_tiktoken(path):
        encode = tiktoken_encoder(path, options.pattern or LLAMA3_PATTERN)
        return _Original(encode, _from_tiktoken(path, options), ORIGINAL)
    given = {"--pattern": options.pattern, "--special-tokens": options.special_tokens}
    if names := [name for name, value in given.items() if value]:
        raise UserError(f"{' and '.join(names)}: for tiktoken files; {path} names its own, so omit the option")
    if path.name == "tokenizer.json":
        raise UserError(f"{path}: a Hugging Face tokenizer already; give its folder as it is")
    if is_json:
        encode = tekken_encoder(path)  # first: it says what is missing
        return _Original(encode, Tekken.read(path).backend(), TEKKEN, TEKKEN_EOS)
    encode = sentencepiece_encoder(path)
    return _Original(encode, *_from_sentencepiece(path))


def _from_tiktoken(path: Path, options: ConvertTokenizerOptions) -> tokenizers.Tokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = list(dict.fromkeys([*options.special_tokens, *filter(None, [options.eos_token])]))
    pattern = options.pattern or LLAMA3_PATTERN
    return TikTokenConverter(str(path), pattern=pattern, extra_special_tokens=special).converted()


def _from_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, str, str | None, Sequence[str]]:
    """The tokenizer of a model file, the name to keep the file under, its end-of-sequence token, its symbols."""
    import_optional("google.protobuf", f"{path}: a SentencePiece model")
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(path.read_bytes())
    settings, rules = model.trainer_spec, model.normalizer_spec
    user_defined = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    # An added token would part the text, and each part gain the space of the beginning. One character has no merges.
    stand_ins = dict(zip(sorted(user_defined, key=len, reverse=True), _STAND_INS, strict=False))
    if not rules.add_dummy_prefix or len(user_defined) > len(_STAND_INS):
        stand_ins = {}
    backend = tokenizers.Tokenizer(_sentencepiece_model(model, stand_ins))
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(name, character) for name, character in stand_ins.items()]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            *(decoders.Replace(character, name) for name, character in stand_ins.items()),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *last,
        ]
    )
    for piece in model.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == piece.USER_DEFINED and piece.piece not in stand_ins:
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
    return backend, ORIGINAL, settings.eos_piece if settings.eos_id >= 0 else None, user_defined


def _sentencepiece_model(model: Any, stand_ins: Mapping[str, str]) -> Any:
    from transformers.convert_slow_tokenizer import generate_merges

    settings = model.trainer_spec
    scores = [(stand_ins.get(piece.piece, piece.piece), piece.score) for piece in model.pieces]
    if settings.model_type == settings.UNIGRAM:
        return models.Unigram(scores, unk_id=settings.unk_id, byte_fallback=settings.byte_fallback)
    if settings.model_type != settings.BPE:
        raise UserError("a SentencePiece model of words or characters is not supported: it must be BPE or Unigram")
    vocabulary = {name: id for id, (name, _) in enumerate(scores)}
    merges = generate_merges(
        vocabulary,
        scores,
        [name for piece, (name, _) in zip(model.pieces, scores, strict=True) if piece.type != piece.NORMAL],
    )
    return models.BPE(
        vocabulary, merges, unk_token=settings.unk_piece, fuse_unk=True, byte_fallback=settings.byte_fallback
    )


def _write(folder: Path, path: Path, original: _Original, eos_token: str | None) -> None:
    """tokenizer.json, the original, and the files next to it; its configuration with the end-of-sequence token."""
    for name in TOKENIZER_FILES:
        if (neighbour := path.with_name(name)).is_file():
            shutil.copyfile(neighbour, folder / name)
    shutil.copyfile(path, folder / original.name)
    original.backend.save(str(folder / "tokenizer.json"))
    config = folder / CONFIG
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # others build parts of tokenizer.json themselves
    settings["eos_token"] = eos_token or settings.get("eos_token") or original.eos
    if settings["eos_token"] is None:
        raise UserError(f"{path}: it names no end-of-sequence token: give --eos-token")
    config.write_bytes(pretty(settings, indent=1))
