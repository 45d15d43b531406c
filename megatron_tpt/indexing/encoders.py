"""Encoding many texts at once: gigatoken where it is proven to agree, Hugging Face tokenizers as the reference.

choose_encoder(tokenizer, "auto", sample) encodes a sample of the real input, and texts that tokenizers are known to
trip over, with both, and takes gigatoken only when every token is the same. While indexing, each block's encoder
compares one more text (`check`).
"""

import json
import logging
import random
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy
import pyarrow

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.arrow_texts import array_of, text_buffers
from megatron_tpt.indexing.options import Backend
from megatron_tpt.indexing.tokenizer import Tokenizer, read_description
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

logger = logging.getLogger(__name__)

NASTY_TEXTS = (
    "a",
    " ",
    "\n",
    "\t\t  \n\n \r\n\r x",
    "  two  spaces   three    four ",
    "don't I'll we've I'M IT'S ʼs 's't're",
    "1 12 123 1234 12345 3.14 1,000,000 ½ ² ٣ 一二三 ①",
    "naïve café cafe\u0301 Å \u212b ﬁ ﬀ ẞ ß İ ı",
    "日本語の文章。中文，标点！ 한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽 \u200d\ufe0f",
    "\u00a0\u2003\u3000\u200b\u2028\u2029\u0085\ufeff x\u00a0y",
    "\x00\x01\x1f\x7f\x80\x9f \ufffd \U0010ffff \ue000",
    "a\u0300\u0301\u0302\u0303 \u0e33 \u1100\u1161\u11a8",
    "ab" * 300,
    " " * 300,
    "!?" * 100 + "...---===***___///\\\\\\",
    "def f(x):\n    return x  # ok\n\n\n\tif (a&&b||c)!=d{e[0]++;}",
    "<think>a</think> <|endoftext|> <s></s> [INST] <unk> ▁ Ġ Ċ <0x0A> ##a",
    f"{OPEN_TAG}{CLOSE_TAG}",
    "http://example.org/a_b?c=d&e=%20#f user@example.org C:\\dir",
    "LaTeX: $\\frac{a_1}{b^{2}}$ \\begin{align} x &= y \\\\ \\end{align}",
    "<<48/2=24>>24 #### 24",
    "ALLCAPS CamelCase snake_case kebab-case x2y3 3rd ２０２４",
)
_BYTES_PER_CHECKED_CHARACTER = 1000  # gigatoken is up to 70 times as fast as the reference
_MAX_CHECKED_CHARACTERS = 1 << 18
_STRETCH_CHARACTERS = 10_000


class Encoded(NamedTuple):
    """Tokens of several texts, one after another."""

    tokens: numpy.ndarray
    """[num_tokens], of an integer type."""
    lengths: numpy.ndarray
    """Tokens of each text, [num_texts], int64."""


class Encoder(Protocol):
    """Encodes texts as raw text. Threads may call it at the same time."""

    name: str

    def encode(self, texts: pyarrow.LargeStringArray) -> Encoded:
        """The tokens of every text. Raises UserError for what the tokenizer cannot encode."""


class ReferenceEncoder:
    """Hugging Face tokenizers: what is right by definition."""

    name = "reference"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: pyarrow.LargeStringArray) -> Encoded:
        return _encoded(self._tokenizer.encode_batch(texts.to_pylist()))


class GigatokenEncoder:
    """gigatoken: the same tokens many times faster. Raises ValueError for a tokenizer that it does not support."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, num_threads: int = 1) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._tokenizer = tokenizer
        self._is_parallel = num_threads > 2  # with two, one encodes while the other parses: that wastes least
        try:
            self._backend = load_hf_json(json.dumps(_description(tokenizer)))
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(" ".join(str(error).split("Location:")[0].split())) from error

    def encode(self, texts: pyarrow.LargeStringArray) -> Encoded:
        if not len(texts):
            return Encoded(numpy.zeros(0, numpy.uint32), numpy.zeros(0, numpy.int64))
        layout = self._backend.encode_batch(_as_awkward(texts), parallel=self._is_parallel).layout
        bounds = numpy.asarray(layout.offsets)
        tokens = numpy.asarray(layout.content.data)[bounds[0] : bounds[-1]]
        if len(special := self._tokenizer.find_special(tokens)):
            return self._spell_out(texts, tokens, bounds - bounds[0], special)
        return Encoded(tokens, numpy.diff(bounds))

    def _spell_out(self, texts: Any, tokens: numpy.ndarray, bounds: numpy.ndarray, special: numpy.ndarray) -> Encoded:
        """Models whose vocabulary is looked up by whole words can still find a special token."""
        parts = numpy.split(tokens, bounds[1:-1])
        for i in numpy.unique(numpy.searchsorted(bounds, special, side="right") - 1):
            parts[i] = self._tokenizer.encode_batch([texts[int(i)].as_py()])[0]
        return _encoded(parts)


def _encoded(parts: Sequence[numpy.ndarray]) -> Encoded:
    lengths = numpy.fromiter(map(len, parts), numpy.int64, len(parts))
    return Encoded(numpy.concatenate(parts) if parts else numpy.zeros(0, numpy.int32), lengths)


def _description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json for gigatoken: without the special tokens that raw text must not make, and without the
    wrapping around a single pre-tokenizer or normalizer, which it does not know."""
    description = read_description(tokenizer.folder)
    if not tokenizer.parse_special_tokens:
        added = description.get("added_tokens") or []
        description["added_tokens"] = [token for token in added if token["content"] not in tokenizer.special_tokens]
    for key, parts in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")):
        step = description.get(key)
        while isinstance(step, dict) and step.get("type") == "Sequence" and len(step.get(parts) or []) == 1:
            step = description[key] = step[parts][0]
    return description | {"truncation": None, "padding": None, "post_processor": None}


def _as_awkward(texts: pyarrow.LargeStringArray) -> Any:
    """The array type that gigatoken takes, on the same memory."""
    import awkward

    bounds, data = text_buffers(texts)
    characters = awkward.contents.NumpyArray(data, parameters={"__array__": "char"})
    strings = awkward.contents.ListOffsetArray(
        awkward.index.Index64(bounds), characters, parameters={"__array__": "string"}
    )
    return awkward.Array(strings)


def choose_encoder(tokenizer: Tokenizer, backend: Backend, sample: Sequence[str], num_threads: int = 1) -> Encoder:
    """The encoder to index with.

    "auto" is gigatoken where it supports the tokenizer and agrees with the reference on `sample` and NASTY_TEXTS, else
    the reference, with a line on stderr that says why. "gigatoken" raises UserError where "auto" would fall back.
    """
    if backend == "reference":
        return ReferenceEncoder(tokenizer)
    try:
        encoder = GigatokenEncoder(tokenizer, num_threads)
        disagreement = _disagreement(tokenizer, encoder, [*sample, *_encodable(tokenizer, NASTY_TEXTS)])
    except ValueError as error:
        problem = f"gigatoken does not support this tokenizer ({error})"
    else:
        if disagreement is None:
            return encoder
        problem = f"gigatoken and Hugging Face tokenizers disagree on {_shown(disagreement)}"
    if backend == "gigatoken":
        raise UserError(f"{tokenizer.folder}: {problem}; index with --tokenizer-backend reference")
    logger.warning(f"{tokenizer.folder}: {problem}; indexing with the reference, many times slower")
    return ReferenceEncoder(tokenizer)


def _encodable(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts that the reference can encode: not every tokenizer knows every character."""
    known = []
    for text in texts:
        try:
            tokenizer.encode(text)
        except UserError:
            continue
        known.append(text)
    return known


def _disagreement(tokenizer: Tokenizer, encoder: Encoder, texts: Sequence[str]) -> str | None:
    """The first text that `encoder` and the reference encode differently."""
    tokens, lengths = encoder.encode(array_of(texts))
    expected = tokenizer.encode_batch(texts)
    for text, found, wanted in zip(texts, numpy.split(tokens, numpy.cumsum(lengths)[:-1]), expected, strict=True):
        if not numpy.array_equal(found, wanted):
            return text
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


class DisagreementError(UserError):
    """gigatoken has encoded a text of the input wrongly."""


class SpotCheck:
    """Compares one text in each batch with the reference, while the job runs, within a small share of its time.

    The reference encodes a thousandth of what gigatoken does, and something at the start: long texts are compared less
    often than short ones. Of the longest, both encode a stretch from a random place.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._count = 0
        self._affordable = float(_MAX_CHECKED_CHARACTERS)
        self._random = random.Random(0)
        self._lock = threading.Lock()

    def check(self, texts: pyarrow.LargeStringArray, encoded: Encoded) -> None:
        """Raise DisagreementError when the next text to check was encoded differently from the reference."""
        if not len(texts):
            return
        with self._lock:
            self._count += 1
            place = self._count * 7919 % len(texts)
            text = texts[place].as_py()
            is_whole = len(text) <= _MAX_CHECKED_CHARACTERS
            cost = len(text) if is_whole else _STRETCH_CHARACTERS
            self._affordable += texts.nbytes / _BYTES_PER_CHECKED_CHARACTER
            if cost > self._affordable:
                return
            self._affordable -= cost
            begin = 0 if is_whole else self._random.randrange(len(text) - cost + 1)
        if is_whole:
            end = int(encoded.lengths[: place + 1].sum())
            found = encoded.tokens[end - int(encoded.lengths[place]) : end]
        else:
            text = text[begin : begin + cost]
            found = self._encoder.encode(array_of([text])).tokens
        if not numpy.array_equal(found, self._tokenizer.encode_batch([text])[0]):
            raise DisagreementError(
                f"gigatoken and Hugging Face tokenizers disagree on {_shown(text)}: nothing is kept of what gigatoken "
                "encoded; index with --tokenizer-backend reference"
            )
