"""A SentencePiece model or a tiktoken file as a Hugging Face folder: the job behind `tools/convert_tokenizer.py`.

The folder is written only when its tokenizer gives the very tokens of the original, on texts that tokenizers are known
to trip over and on a sample of the user's own.
"""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory
from megatron_tpt.indexing.encoders import NASTY_TEXTS
from megatron_tpt.indexing.options import ConvertTokenizerOptions
from megatron_tpt.indexing.originals import (
    ORIGINAL,
    first_difference_from,
    import_optional,
    is_tiktoken,
    sentencepiece_encoder,
    tiktoken_encoder,
)
from megatron_tpt.indexing.tokenizer import TOKENIZER_FILES, Tokenizer
from megatron_tpt.records import read_records

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE_DOCUMENTS = 1000
_SPACE = "\u2581"  # what SentencePiece writes for a space


def convert_tokenizer(options: ConvertTokenizerOptions) -> Path:
    """Write `options.output` and return it. Raises UserError for what cannot be converted to give the same tokens, and
    for an output that exists; then nothing is there."""
    path = _find_original(options.input)
    if options.output.exists():
        raise UserError(f"{options.output} exists; choose another --output or remove it")
    own_eos = None
    if is_tiktoken(path):
        encode, backend = tiktoken_encoder(path, options.pattern or LLAMA3_PATTERN), _from_tiktoken(path, options)
    else:
        encode = sentencepiece_encoder(path)
        backend, own_eos = _from_sentencepiece(path)
    odd = _odd_texts(backend)
    sample = read_records(options.sample, limit=_SAMPLE_DOCUMENTS, advice="fix the line") if options.sample else []
    texts = [record.text for record in sample]
    with atomic_directory(options.output) as folder:
        _write(folder, path, backend, options.eos_token, own_eos)
        text = first_difference_from(encode, Tokenizer(folder), [*odd, *texts])
        if text is not None:
            raise UserError(f"{path}: Hugging Face tokenizers cannot give its tokens: they differ on {text[:60]!r}")
    compared = f"{len(odd)} odd texts" + (f" and {len(texts)} documents" if texts else "")
    print(f"{options.output}: {backend.get_vocab_size():,} tokens; on {compared} they are those of {path}")
    return options.output


def _odd_texts(backend: tokenizers.Tokenizer) -> list[str]:
    """Texts that tokenizers are known to trip over, and the symbols that are always one token in several places."""
    symbols = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    return [*NASTY_TEXTS, "\n".join(NASTY_TEXTS), *(f"{symbol}a {symbol} b{symbol}" for symbol in symbols)]


def _find_original(path: Path) -> Path:
    if path.is_file():
        return path
    found = [*path.glob("*.model"), *path.glob("*.tiktoken")]
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} files *.model or *.tiktoken: name the one to convert")
    return found[0]


def _from_tiktoken(path: Path, options: ConvertTokenizerOptions) -> tokenizers.Tokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = list(dict.fromkeys([*options.special_tokens, *filter(None, [options.eos_token])]))
    pattern = options.pattern or LLAMA3_PATTERN
    return TikTokenConverter(str(path), pattern=pattern, extra_special_tokens=special).converted()


def _from_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer of a model file, and the name of its end-of-sequence token."""
    import_optional("google.protobuf", f"{path}: a SentencePiece model")
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(path.read_bytes())
    settings, rules = model.trainer_spec, model.normalizer_spec
    backend = tokenizers.Tokenizer(_sentencepiece_model(model))
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    for piece in model.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == piece.USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
    return backend, settings.eos_piece if settings.eos_id >= 0 else None


def _sentencepiece_model(model: Any) -> Any:
    from transformers.convert_slow_tokenizer import generate_merges

    settings = model.trainer_spec
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    if settings.model_type == settings.UNIGRAM:
        return models.Unigram(scores, unk_id=settings.unk_id, byte_fallback=settings.byte_fallback)
    if settings.model_type != settings.BPE:
        raise UserError("a SentencePiece model of words or characters is not supported: it must be BPE or Unigram")
    vocabulary = {name: id for id, (name, _) in enumerate(scores)}
    merges = generate_merges(vocabulary, scores, [piece.piece for piece in model.pieces if piece.type != piece.NORMAL])
    return models.BPE(
        vocabulary, merges, unk_token=settings.unk_piece, fuse_unk=True, byte_fallback=settings.byte_fallback
    )


def _write(
    folder: Path, original: Path, backend: tokenizers.Tokenizer, eos_token: str | None, own_eos: str | None
) -> None:
    """tokenizer.json, the original, and what lies beside it; its configuration with the end-of-sequence token."""
    for name in TOKENIZER_FILES:
        if (beside := original.with_name(name)).is_file():
            shutil.copyfile(beside, folder / name)
    shutil.copyfile(original, folder / ORIGINAL)
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    settings["eos_token"] = eos_token or settings.get("eos_token") or own_eos
    if settings["eos_token"] is None:
        raise UserError(f"{original}: it names no end-of-sequence token: give --eos-token")
    path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
