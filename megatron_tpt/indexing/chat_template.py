"""A tokenizer's chat template: conversations to text, to tokens, and to what of them the assistant says."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_program import ChatProgram, Span, TemplateError
from megatron_tpt.indexing.chat_rendering import ConversationRenderer, Rendered
from megatron_tpt.indexing.chat_shapes import TEMPLATE_VARIABLES
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.tokenizer import Tokenizer, loading_failure, read_description
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

# Around the name of a special token that occurs in a message. Unicode keeps these two code points for internal use: no
# text may hold them, and no template touches them, but for those that write JSON or Python, which may escape them.
_RAW_OPEN, _RAW_CLOSE = "\ufdd0", "\ufdd1"
MARKS = (_RAW_OPEN, _RAW_CLOSE)
ESCAPED_MARKS = ("\\ufdd0", "\\ufdd1")
_RAW = re.compile(r"(?:\ufdd0|\\+ufdd0)(.*?)(?:\ufdd1|\\+ufdd1)", re.DOTALL)


class Encoded(NamedTuple):
    """The tokens of a text, and the characters each is made of."""

    tokens: numpy.ndarray
    """int32 [n]"""
    begins: numpy.ndarray
    """First character of each token, [n]."""
    ends: numpy.ndarray
    """Last character + 1 of each token, [n]."""

    def overlaps(self, spans: Sequence[Span]) -> numpy.ndarray:
        """Whether a token holds a character of one of the spans, which are in order, bool [n]."""
        if not spans:
            return numpy.zeros(len(self.tokens), dtype=bool)
        begins, ends = (numpy.array(edge) for edge in zip(*spans, strict=True))
        # The first span that ends after the token begins: if any overlaps it, that one does.
        number = numpy.searchsorted(ends, self.begins, side="right")
        following = numpy.append(begins, numpy.iinfo(begins.dtype).max)[number]
        return (self.ends > following) & (self.ends > self.begins)


class ChatTemplate:
    """The chat template of a tokenizer folder, or of a file, with that tokenizer.

    `variables` are passed to the template (its chat_template_kwargs). Raises UserError when there is no template, when
    it does not compile, when it does not read one of the variables, and when it writes today's date (Llama 3.1 and
    later do) while no `today` is given: the same input would become other tokens tomorrow.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        path: Path | None = None,
        today: date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = tokenizer
        self._raw_tags = RawTags(tokenizer.tag_spellings())
        try:
            reference = PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
        except Exception as error:  # foreign files may be anything
            raise loading_failure(tokenizer.folder, error) from error
        self.text = template = _read_template(reference, tokenizer.folder, path)
        """The template itself."""
        try:
            self._program = ChatProgram(template)
        except UserError as error:
            raise UserError(f"{path or tokenizer.folder}: {error}") from None
        self._variables: dict[str, Any] = {**reference.special_tokens_map, **(variables or {})}
        for name in variables or {}:
            if name in TEMPLATE_VARIABLES or not self.reads(name):
                raise UserError(f"--chat-template-kwargs: the chat template reads no variable {name!r} of yours")
        # What a template shows depends on the special tokens that it is given, too.
        shown = json.dumps([template, self._variables], sort_keys=True, default=str)
        self.checksum = "sha256:" + hashlib.sha256(shown.encode()).hexdigest()
        if "strftime_now" in self._program.names:
            if today is None:
                raise UserError("the chat template writes today's date; give --date YYYY-MM-DD to have the same always")
            self._variables["strftime_now"] = datetime.combine(today, time()).strftime
        elif today is not None:
            raise UserError("--date: the chat template does not ask for today's date (strftime_now): omit it")
        self.has_generation_spans = self._program.has_spans
        self._backend, special = _load_backend(tokenizer.folder)
        self.special_ids = frozenset(special.values())
        names = sorted(special, key=len, reverse=True)
        self._special = _any_of(names)
        self._special_or_tag = _any_of([*names, OPEN_TAG, CLOSE_TAG])
        self._special_at_end = re.compile(rf"(?:{self._special.pattern})(?P<blanks>\s*)\Z")

    def reads(self, variable: str) -> bool:
        """Whether the template mentions a variable."""
        return variable in self._program.names

    def mentions(self, name: str) -> bool:
        """Whether the template mentions a field, a role or another string."""
        return name in self._program.fields

    def spell_out(self, text: str, *, keep_tags: bool) -> str:
        """`text` with marks around the names of special tokens, and of the think tags unless they mean the tags."""
        names = self._special if keep_tags else self._special_or_tag
        return names.sub(rf"{_RAW_OPEN}\g<0>{_RAW_CLOSE}", text)

    def special_names(self, text: str) -> set[str]:
        """The names of special tokens that occur in a text, except for the think tags."""
        return set(self._special.findall(text))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        learned: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        reasoning: Mapping[int, str] | None = None,
    ) -> list[Rendered]:
        """The texts in which the messages `learned` of a conversation, whose strings are spelt out, are learned.

        `reasoning` is that of messages which have any, by place. Raises TemplateError.
        """
        given = {**self._variables, **(variables or {}), "tools": tools, "documents": None}
        renderer = ConversationRenderer(self._program, messages, given, self._special_at_end)
        rendered = renderer.render(learned, reasoning or {})
        for one in rendered:
            without = _RAW.sub("", one.text)
            if any(mark in without for mark in (*MARKS, *ESCAPED_MARKS)):
                raise TemplateError("the chat template cuts through the name of a special token in a message")
        return rendered

    def count_prompt_tokens(self, wholes: Sequence[tuple[str, Encoded, Sequence[int]]]) -> list[list[int | None]]:
        """How many tokens each prompt has: of texts, their tokens, and the characters of the prompts they begin with.

        None where the text's tokens do not begin with the prompt's. Tokenizers take a text apart at its special tokens
        first, so that only what follows the last one before the end of the prompt has to be encoded again.
        """
        parts, places = [], []
        for text, encoded, prompt_ends in wholes:
            special = numpy.flatnonzero(numpy.isin(encoded.tokens, list(self.special_ids)))
            for end in prompt_ends:
                before = special[encoded.ends[special] <= end] if len(special) else special
                first = int(before[-1]) if len(before) else 0
                parts.append(text[int(encoded.begins[first]) if len(before) else 0 : end])
                places.append((encoded.tokens, first))
        counts: list[int | None] = []
        for part, (tokens, first) in zip(self.encode_batch(parts), places, strict=True):
            last = first + len(part.tokens)
            counts.append(last if numpy.array_equal(part.tokens, tokens[first:last]) else None)
        found = iter(counts)
        return [[next(found) for _ in prompt_ends] for _, _, prompt_ends in wholes]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of rendered texts, in which special tokens mean themselves but where they are marked as spelt out."""
        pieces = [_pieces(text) for text in texts]
        encodings = iter(self._encode([piece.text for one in pieces for piece in one if not piece.is_raw]))
        raw = iter(self._tokenizer.encode_batch([piece.text for one in pieces for piece in one if piece.is_raw]))
        result = []
        for one in pieces:
            parts = []
            for piece in one:
                if piece.is_raw:
                    tokens = self._raw_tags.spell_out_text(next(raw))
                    offsets = numpy.tile([0, len(piece.text)], (len(tokens), 1))
                else:
                    encoding = next(encodings)
                    tokens = numpy.array(encoding.ids, dtype=numpy.int32)
                    offsets = numpy.array(encoding.offsets, dtype=numpy.int64).reshape(-1, 2)
                parts.append(Encoded(tokens, piece.begin + offsets[:, 0], piece.begin + offsets[:, 1]))
            result.append(Encoded(*map(numpy.concatenate, zip(*parts, strict=True))))
        return result

    def _encode(self, texts: Sequence[str]) -> Any:
        try:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # bare Exception, for instance without a token for the unknown
            folder = self._tokenizer.folder
            raise UserError(f"{folder}: this tokenizer cannot encode a text of the input ({error})") from error


class _Piece(NamedTuple):
    """A part of a rendered text, at `begin` there; a raw one is a name to be spelt out."""

    text: str
    begin: int
    is_raw: bool


def _pieces(text: str) -> list[_Piece]:
    """Split a text at its marks: rendered, spelt out, rendered, ... ."""
    pieces, begin = [], 0
    for match in _RAW.finditer(text):
        pieces.append(_Piece(text[begin : match.start()], begin, False))
        pieces.append(_Piece(match[1], match.start(1), True))
        begin = match.end()
    return [*pieces, _Piece(text[begin:], begin, False)]


def unmarked(text: str) -> str:
    """A rendered text as it reads, without marks."""
    return _RAW.sub(r"\1", text)


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")


def read_template_file(path: Path) -> str:
    """The chat template in a file. Raises UserError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the chat template cannot be read ({error})") from error


def _read_template(reference: Any, folder: Path, path: Path | None) -> str:
    if path is not None:
        return read_template_file(path)
    try:
        return str(reference.get_chat_template())
    except ValueError:
        raise UserError(
            f"{folder}: this tokenizer has no chat template, or several and no default: give one with --chat-template"
        ) from None


def _load_backend(folder: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer as it encodes rendered text, and the ids of its special tokens, the think tags apart, by name."""
    import tokenizers

    description = read_description(folder)
    # It only adds tokens, which the template does here, and shifts offsets away from blanks.
    description["post_processor"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    added = description.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token["special"]}
    return backend, {name: id for name, id in special.items() if name not in (OPEN_TAG, CLOSE_TAG)}
