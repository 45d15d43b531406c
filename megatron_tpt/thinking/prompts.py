"""The prompt that asks for thinking: the document first, a mark where it ends, then what to do with it.

A template is a text with placeholders in braces:

    {document}            the document
    {focused_document}    the document with a mark at a random place, where the reader is said to be
    {question}, ...       a text column of the input, by its name

Braces that are meant as such are doubled, as in Python's `str.format`. The model's chat template, where it has one,
goes around it, and for a model that thinks the thinking block is opened, so that the first token it writes belongs to
the thinking.
"""

import bisect
import json
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError, failure
from megatron_tpt.generation import begin_ids, render_chat
from megatron_tpt.think_tags import OPEN_TAG
from megatron_tpt.thinking.options import ThinkingBlock
from megatron_tpt.thinking.thoughts import Wants

DOCUMENT = "document"
FOCUSED = "focused_document"
FOCUS_MARK = " [[the reader is here]] "

_EXPERT = """\
{%s}

[End of the text]

Think as a leading expert would who has just read the text above, and write down the whole train of thought while you \
work it through in depth. %sStay with what is difficult or rich in content and pass over what is obvious. Where it \
helps, use Feynman's method: explain the idea in plain words as if teaching it, notice where the explanation breaks \
down, and repair it until you really understand.
"""
_BACK_THINKING = """\
{question}

[The answer that was found]
{answer}

[End of the text]

The answer above is known to be right. Write down the train of thought of someone who meets the question for the first \
time, does not know the answer yet, and works towards it step by step, with the doubts and checks that belong to it, \
until that very answer is reached.
"""
_REPHRASE = """\
{document}

[End of the text]

Write the text above once more in your own words, in clear and careful prose. Keep every fact, number, formula and \
argument, add none, and give nothing but the new text.
"""

# In place of placeholder number i while the chat template is applied; private-use characters, which no template
# touches.
_MARK = "\ue000{}\ue001"
_ANY_MARK = re.compile("\ue000(\\d+)\ue001")
# A model whose chat template or vocabulary knows these can think before it answers.
_THINKS = "enable_thinking"
_THINKING_SIGNS = (OPEN_TAG, _THINKS)
# A chunk of a long document ends at a line or between words where one is found in its last part.
_WHOLE_WORDS_WITHIN = 0.8
# Where there is no tokenizer. About right for English in today's vocabularies.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Template:
    """What is asked about a document."""

    name: str
    text: str
    wants: Wants = "thinking"
    """Whether the thoughts of a model that thinks are wanted, or what it answers after them."""

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The names in braces, in their order."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None)


EXPERT = Template("expert", _EXPERT % (DOCUMENT, ""))
_WHERE = "The mark in double brackets shows which passage is being read: begin with that passage. "
TEMPLATES = {
    template.name: template
    for template in (
        EXPERT,
        Template("random-focus", _EXPERT % (FOCUSED, _WHERE)),
        Template("back-thinking", _BACK_THINKING),
        Template("rephrase", _REPHRASE, wants="answer"),
    )
}


def load_template(name_or_path: str, text_columns: Sequence[str]) -> Template:
    """One of the project's templates by name, or the one in a file.

    Raises UserError unless it holds the document, or text columns, and each of them once.
    """
    template = TEMPLATES.get(name_or_path) or _read_template(Path(name_or_path))
    try:
        names = template.placeholders
    except ValueError as error:
        raise UserError(f"{name_or_path}: not a template ({error}); write {{{{ and }}}} for braces") from error
    known = (DOCUMENT, FOCUSED, *text_columns)
    for name in names:
        if name not in known:
            raise UserError(
                f"{name_or_path}: nothing is known of the placeholder {{{name}}}; there are "
                f"{', '.join(f'{{{other}}}' for other in known)} (the last ones from --text-column); "
                "write {{ and }} for braces"
            )
        if names.count(name) > 1:
            raise UserError(f"{name_or_path}: the template has {{{name}}} {names.count(name)} times; use it once")
    if not names:
        raise UserError(f"{name_or_path}: the template has no placeholder; put {{{DOCUMENT}}} where the document goes")
    return template


def _read_template(path: Path) -> Template:
    try:
        return Template(path.name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(
            f"{path}: the prompt template cannot be read ({error.strerror}); "
            f"the templates known by name are {', '.join(TEMPLATES)}",
            error,
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the prompt template is not UTF-8 text") from error


def can_think(tokenizer: Any) -> bool:
    """Whether the tokenizer's model was made to think before it answers."""
    template = tokenizer.chat_template or ""
    return any(sign in template for sign in _THINKING_SIGNS) or _THINKING_SIGNS[0] in tokenizer.get_added_vocab()


class Part(NamedTuple):
    """A text with its tokens, which are only known where there is a tokenizer."""

    text: str
    ids: list[int]


class Documents:
    """Measures documents in the generator's tokens and cuts long ones.

    Without a tokenizer (a server that shows none) four characters count as a token. Documents are raw text: special
    tokens that happen to occur in one are spelt out, so that no document can end its own prompt.
    """

    def __init__(self, tokenizer: Any | None, max_tokens: int) -> None:
        if tokenizer is not None and not tokenizer.is_fast:
            raise UserError("the model's tokenizer is not a fast one; add its tokenizer.json to the model's folder")
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of `text`, and for each the character at which it ends."""
        if self._tokenizer is None:
            ends = [*range(_CHARACTERS_PER_TOKEN, len(text), _CHARACTERS_PER_TOKEN), len(text)]
            return [0] * len(ends), ends
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return encoded.input_ids, [end for _, end in encoded.offset_mapping]

    def count(self, text: str) -> int:
        """Number of tokens in `text`."""
        return len(self.encode(text)[0])

    def first(self, text: str) -> tuple[Part, int]:
        """The first `max_tokens` tokens of `text`, and how many it has in all."""
        ids, ends = self.encode(text)
        if len(ids) <= self.max_tokens:
            return Part(text, ids), len(ids)
        return Part(text[: ends[self.max_tokens - 1]], ids[: self.max_tokens]), len(ids)

    def chunks(self, text: str) -> Iterator[tuple[Part, int]]:
        """All of `text` in parts of at most `max_tokens` tokens, each with the character at which it ends."""
        ids, ends = self.encode(text)
        first = 0
        while first < len(ids):
            last = min(first + self.max_tokens, len(ids))
            begin = ends[first - 1] if first else 0
            if last < len(ids):
                last = bisect.bisect_right(ends, _whole_words(text, begin, ends[last - 1]), lo=first + 1, hi=last)
            end = ends[last - 1] if last < len(ids) else len(text)
            yield Part(text[begin:end], ids[first:last]), end
            first = last


def _whole_words(text: str, begin: int, end: int) -> int:
    """Where to end a chunk that could go from `begin` to `end`: after a paragraph, a line or a word."""
    earliest = begin + int((end - begin) * _WHOLE_WORDS_WITHIN)
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, earliest, end)
        if found >= 0:
            return found + len(separator)
    return end


class Prompt:
    """A template bound to a model's tokenizer, or to a chat server that applies its own chat template.

    The parts around the document are tokenized once, with special tokens meaning what they say.
    """

    def __init__(
        self,
        template: Template,
        documents: Documents,
        tokenizer: Any | None,
        *,
        thinking_block: ThinkingBlock = "auto",
        open_tag: str = OPEN_TAG,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """With `tokenizer` None the prompts are chat messages, else token ids."""
        self._documents = documents
        self._names = template.placeholders
        self._as_messages = tokenizer is None
        self.opens_thinking = tokenizer is not None and _opens_thinking(template, tokenizer, thinking_block)
        if tokenizer is None:
            self._between = re.split(_ANY_MARK, _marked(template))[::2]
            return
        self._between = render(
            template, tokenizer, open_tag if self.opens_thinking else None, chat_template_kwargs or {}
        )
        self._ids = [tokenizer(text, add_special_tokens=False).input_ids for text in self._between]
        if tokenizer.chat_template is None:
            self._ids[0] = begin_ids(tokenizer) + self._ids[0]
        self._mark_ids = documents.encode(FOCUS_MARK)[0]

    @property
    def max_tokens(self) -> int:
        """The longest prompt there can be, in tokens; for chat messages without what the server adds."""
        around = self._documents.count("".join(self._between)) if self._as_messages else sum(map(len, self._ids))
        mark = self._documents.count(FOCUS_MARK) if FOCUSED in self._names else 0
        return around + len(self._names) * self._documents.max_tokens + mark

    def fill(self, document: Part, columns: Mapping[str, str], seed: int) -> list[int] | list[dict[str, str]]:
        """The prompt about `document`: token ids, or chat messages.

        `columns` has the texts of the other placeholders, each cut to the limit; `seed` sets the place of the mark.
        """
        parts = [self._value(name, document, columns, seed) for name in self._names]
        if self._as_messages:
            texts = [text for text, part in zip(self._between, parts, strict=False) for text in (text, part.text)]
            return [{"role": "user", "content": "".join([*texts, self._between[-1]])}]
        ids = list(self._ids[0])
        for part, following in zip(parts, self._ids[1:], strict=True):
            ids += part.ids
            ids += following
        return ids

    def _value(self, name: str, document: Part, columns: Mapping[str, str], seed: int) -> Part:
        if name == DOCUMENT:
            return document
        if name == FOCUSED:
            return self._with_mark(document, random.Random(seed))
        return self._documents.first(columns[name])[0]

    def _with_mark(self, document: Part, chance: random.Random) -> Part:
        if self._as_messages:
            at = chance.randrange(len(document.text) + 1)
            return Part(document.text[:at] + FOCUS_MARK + document.text[at:], [])
        at = chance.randrange(len(document.ids) + 1)
        return Part("", document.ids[:at] + self._mark_ids + document.ids[at:])


def _opens_thinking(template: Template, tokenizer: Any, thinking_block: ThinkingBlock) -> bool:
    if thinking_block == "auto":
        return template.wants == "thinking" and can_think(tokenizer)
    return thinking_block == "open"


def _marked(template: Template) -> str:
    """The template with a mark for every placeholder, and its doubled braces single."""
    parts = []
    for i, (literal, name, _, _) in enumerate(string.Formatter().parse(template.text)):
        parts += [literal, _MARK.format(i) if name is not None else ""]
    return "".join(parts)


def ends_in(open_tag: str, between: Sequence[str]) -> bool:
    """Whether the prompt that `render` gave leaves the model in its thinking; some chat templates always do."""
    return re.search(rf"{re.escape(open_tag)}\s*\Z", between[-1]) is not None


def render(
    template: Template, tokenizer: Any, open_tag: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """The texts before, between and after the placeholders, with the chat template (where there is one) around them.

    `open_tag` ends the last one; with None the model is instructed not to think. Raises UserError for a chat template
    that does not show the user's message once, and for `chat_template_kwargs` that it does not use.
    """
    content = _marked(template)
    kwargs = dict(chat_template_kwargs or {})
    _check_kwargs(kwargs, tokenizer.chat_template, thinks=open_tag is not None)
    if tokenizer.chat_template is not None:
        marks = _ANY_MARK.findall(content)
        messages = [{"role": "user", "content": content}]
        # Models that can both think and answer at once know this switch; the others ignore it.
        content = render_chat(tokenizer, messages, **{_THINKS: open_tag is not None} | kwargs)
        if _ANY_MARK.findall(content) != marks:
            raise UserError("the model's chat template does not show the user's message once; use another model")
    between: list[str] = re.split(_ANY_MARK, content)[::2]
    if open_tag is not None and not ends_in(open_tag, between):
        between[-1] += ("" if between[-1].endswith("\n") else "\n") + f"{open_tag}\n"
    return between


def _check_kwargs(kwargs: Mapping[str, Any], chat_template: str | None, *, thinks: bool) -> None:
    """Raise UserError for arguments that the chat template would ignore, or that contradict the thinking block."""
    for name, value in kwargs.items():
        if chat_template is None:
            raise UserError(f"chat_template_kwargs {name}: the model has no chat template; omit them")
        if name in ("messages", "add_generation_prompt", "tokenize"):
            raise UserError(f"chat_template_kwargs {name}: is set by how the prompt is made; omit it")
        if not re.search(rf"\b{re.escape(name)}\b", chat_template):
            raise UserError(f"chat_template_kwargs {name}: the model's chat template does not use it; omit it")
        if name == _THINKS and value is not thinks:
            block = "open" if value else "none"
            raise UserError(
                f"chat_template_kwargs {name}={json.dumps(value)}: contradicts the thinking block, which is "
                f"{'open' if thinks else 'not opened'}; give --thinking-block {block} in its place"
            )
