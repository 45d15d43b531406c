"""A tokenizer's chat template: conversations to text, to tokens, and to what of them the assistant says."""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.raw_tags import RawTags
from megatron_tpt.indexing.tokenizer import CLOSE_TAG, OPEN_TAG, Tokenizer

Message = dict[str, str]
Span = tuple[int, int]

# Around the name of a special token that stands in a message. Unicode keeps these two code points for internal use: no
# text may hold them, and no template touches them.
_RAW_OPEN, _RAW_CLOSE = "\ufdd0", "\ufdd1"
MARKS = (_RAW_OPEN, _RAW_CLOSE)
_RAW = re.compile(f"{_RAW_OPEN}(.*?){_RAW_CLOSE}", re.DOTALL)


class TemplateError(Exception):
    """A conversation that the template cannot show, or not as it must. The text says why."""


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[Span]
    """First and last + 1 character of what the assistant says."""
    prompts: list[str]
    """Beginnings of the text that the tokens must begin with too."""


class Encoded(NamedTuple):
    """The tokens of a text, and the characters each is made of."""

    tokens: numpy.ndarray
    """int32 [n]"""
    begins: numpy.ndarray
    """First character of each token, [n]."""
    ends: numpy.ndarray
    """Last character + 1 of each token, [n]."""

    def overlaps(self, spans: Sequence[Span]) -> numpy.ndarray:
        """Whether a token holds a character of one of the spans, bool [n]."""
        found = numpy.zeros(len(self.tokens), dtype=bool)
        for begin, end in spans:
            found |= (self.ends > begin) & (self.begins < end)
        return found


class ChatTemplate:
    """The chat template of a tokenizer folder, or of a file, with that tokenizer.

    Raises UserError when there is none, when it does not compile, and when it writes today's date (Llama 3.1 and later
    do) while no `today` is given: the same input would become other tokens tomorrow.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path | None = None, today: date | None = None) -> None:
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = tokenizer
        self._raw_tags = RawTags(tokenizer.tag_spellings())
        reference = PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
        self._template = _read_template(reference, tokenizer.folder, path)
        self._variables: dict[str, Any] = dict(reference.special_tokens_map)
        # What a template shows depends on the special tokens that it is given, too.
        shown = json.dumps([self._template, self._variables], sort_keys=True, default=str)
        self.checksum = "sha256:" + hashlib.sha256(shown.encode()).hexdigest()
        if "strftime_now" in self._template:
            if today is None:
                raise UserError("the chat template writes today's date; give --date YYYY-MM-DD to have the same always")
            self._variables["strftime_now"] = datetime.combine(today, time()).strftime
        self.has_generation_spans = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        self._backend, special = _load_backend(tokenizer.folder)
        self.special_ids = frozenset(special.values())
        names = sorted(special, key=len, reverse=True)
        self._special = _any_of(names)
        self._special_or_tag = _any_of([*names, OPEN_TAG, CLOSE_TAG])
        self._special_at_end = re.compile(rf"(?:{self._special.pattern})(?P<blanks>\s*)\Z")

    @property
    def text(self) -> str:
        """The template itself, in Jinja."""
        return self._template

    def spell_out(self, text: str, *, keep_tags: bool) -> str:
        """`text` with marks around the names of special tokens, and of the think tags unless they mean the tags."""
        names = self._special if keep_tags else self._special_or_tag
        return names.sub(rf"{_RAW_OPEN}\g<0>{_RAW_CLOSE}", text)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation whose contents are spelt out. Raises TemplateError."""
        if self.has_generation_spans:
            text, spans = self._apply(messages)
            rendered = Rendered(text, spans, [])
        else:
            rendered = self._derive_spans(messages)
        if any(mark in _RAW.sub("", text) for text in (rendered.text, *rendered.prompts) for mark in MARKS):
            raise TemplateError("the chat template cuts through the name of a special token in a message")
        return rendered

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=self.has_generation_spans,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateError(f"the chat template refuses it ({' '.join(str(error).split())})") from None
        return texts[0], spans[0] if spans else []

    def _derive_spans(self, messages: Sequence[Message]) -> Rendered:
        """Tell what the assistant says by rendering the conversation up to each of its messages."""
        text, _ = self._apply(messages)
        spans, prompts = [], []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._apply(messages[:i], add_generation_prompt=True)
            turn, _ = self._apply(messages[: i + 1])
            if not (text.startswith(turn) and turn.startswith(prompt)):
                raise TemplateError(
                    f"message {i + 1} does not follow the generation prompt as it was written: templates that drop "
                    f"the reasoning of earlier turns (Qwen3, DeepSeek-R1) do so; give every turn as a conversation of "
                    f"its own, or a template that keeps it or has {{% generation %}} spans (--chat-template)"
                )
            spans.append((len(prompt), self._end_of_turn(turn, len(prompt))))
            prompts.append(prompt)
        return Rendered(text, spans, prompts)

    def _end_of_turn(self, turn: str, begin: int) -> int:
        """The end of what the assistant writes: blanks after the token that ends its turn are the template's."""
        found = self._special_at_end.search(turn, begin)
        return found.start("blanks") if found else len(turn)

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
    """Cut a text at its marks: rendered, spelt out, rendered, ... ."""
    pieces, begin = [], 0
    for i, part in enumerate(_RAW.split(text)):
        is_raw = i % 2 == 1
        begin += is_raw
        pieces.append(_Piece(part, begin, is_raw))
        begin += len(part) + is_raw
    return pieces


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")


def _read_template(reference: Any, folder: Path, path: Path | None) -> str:
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the chat template cannot be read ({error})") from None
    try:
        return str(reference.get_chat_template())
    except ValueError:
        raise UserError(
            f"{folder}: this tokenizer has no chat template, or several and no default: give one with --chat-template"
        ) from None


def _load_backend(folder: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer as it encodes rendered text, and the ids of its special tokens, the think tags apart, by name."""
    import tokenizers

    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # It only adds tokens, which the template does here, and shifts offsets away from blanks.
    description["post_processor"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    added = description.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token["special"]}
    return backend, {name: id for name, id in special.items() if name not in (OPEN_TAG, CLOSE_TAG)}
