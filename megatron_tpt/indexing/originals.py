"""The tokenizer that a converted one was made of: a SentencePiece model or a tiktoken file, kept next to tokenizer.json
as tokenizer.model, or Mistral's tekken.json. It is the reference of the reference: both must give the same tokens.
"""

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.tekken import Tekken
from megatron_tpt.indexing.tokenizer import Tokenizer, read_description

logger = logging.getLogger(__name__)

ORIGINAL = "tokenizer.model"
TEKKEN = "tekken.json"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

Encode = Callable[[str], list[int]]


def is_tiktoken(path: Path) -> bool:
    """Whether a file is tiktoken's, lines of a token in base64 and its rank, rather than a SentencePiece model."""
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.fullmatch(file.readline(1 << 16)) is not None


def import_optional(name: str, why: str) -> Any:
    """A package of the extra `tokenizers`. Raises UserError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{why} needs the package {name}: pip install 'megatron-tpt[tokenizers]'") from None


def sentencepiece_encoder(path: Path) -> Encode:
    """How a SentencePiece model encodes raw text. Raises UserError for a file that is none."""
    sentencepiece = import_optional("sentencepiece", f"{path}: a SentencePiece model")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not readable as a SentencePiece model ({' '.join(str(error).split())})") from None
    return processor.encode


def tiktoken_encoder(path: Path, pattern: str) -> Encode:
    """How tiktoken encodes raw text with the ranks in a file. Raises UserError for a file or pattern that is none."""
    tiktoken = import_optional("tiktoken", f"{path}: a tiktoken file")
    from tiktoken.load import load_tiktoken_bpe

    try:
        ranks = load_tiktoken_bpe(str(path))
        encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise UserError(f"{path}: not readable with tiktoken ({' '.join(str(error).split())})") from None
    return encoding.encode_ordinary


def tekken_encoder(path: Path) -> Encode:
    """How Mistral's library encodes raw text with a tekken.json. Raises UserError for a file that is none."""
    tiktoken = import_optional("tiktoken", f"{path}: a tekken.json")
    tekken = Tekken.read(path)
    encoding = tiktoken.Encoding(path.name, pat_str=tekken.pattern, mergeable_ranks=tekken.ranks, special_tokens={})
    return lambda text: [rank + len(tekken.special) for rank in encoding.encode_ordinary(text)]


def first_difference_from(encode: Encode, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first of the texts that a tokenizer and its original encode differently. Names of special tokens, which only
    the one knows, are not compared."""
    names = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
    texts = [text for text in texts if not names.search(text)]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not numpy.array_equal(tokens, encode(text)):
            return text
    return None


def has_original(folder: Path) -> bool:
    """Whether a tokenizer folder keeps what the tokenizer was made of."""
    return _original(folder) is not None


def _original(folder: Path) -> Path | None:
    return next((folder / name for name in (TEKKEN, ORIGINAL) if (folder / name).is_file()), None)


def check_against_original(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raise UserError when a tokenizer encodes a text otherwise than the original in its folder.

    Without the package that reads the original nothing is compared, and stderr says so.
    """
    path = _original(tokenizer.folder)
    assert path is not None
    try:
        if path.name == TEKKEN:
            encode = tekken_encoder(path)
        elif is_tiktoken(path):
            encode = tiktoken_encoder(path, _pattern(tokenizer.folder))
        else:
            encode = sentencepiece_encoder(path)
    except UserError as error:
        logger.warning(f"{error}; tokenizer.json is not compared with it")
        return
    if (text := first_difference_from(encode, tokenizer, texts)) is not None:
        raise UserError(
            f"{tokenizer.folder}: tokenizer.json and {path.name} disagree on {text[:60]!r}: convert {path.name} again "
            f"(tools/convert_tokenizer.py), or move it away where tokenizer.json is right"
        )


def _pattern(folder: Path) -> str:
    """The regular expression by which tokenizer.json splits text into words."""
    content = read_description(folder)
    step = content.get("pre_tokenizer") or {}
    for part in step.get("pretokenizers") or [step]:
        if part.get("type") == "Split" and "Regex" in part["pattern"]:
            return part["pattern"]["Regex"]
    raise UserError(f"{folder / ORIGINAL}: a tiktoken file, and tokenizer.json has no pattern of words")
