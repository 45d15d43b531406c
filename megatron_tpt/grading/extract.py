"""Find the one answer that a model's text gives. Nothing here looks at the reference.

Texts of models that follow instructions are read from their end: the last box, else what the last "answer is" states,
else the last number. Texts of base models continue into the next problem, so they are read from their beginning.
"""

import re
from dataclasses import dataclass

from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

_OPENED = re.compile(rf"(?<![`'\"“‘]){re.escape(OPEN_TAG)}(?![`'\"”’])")
"""The tag where it is not quoted."""
_BOX_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s+(?P<bare>[-+]?\d[\d.,/]*|[A-Za-z]\b)|(?P<box>\\[bf]?box(?:ed)?\s*\{)|\\.|(?P<open>\{)|(?P<close>\})",
    re.S,
)
_BOX_NAMES = ("\\boxed", "\\fbox")
_STATEMENT = re.compile(r"(?i)\banswer\b[*_]{0,2}\s*(?:is\b|:)[:*_]{0,3}")
_FINAL_STATEMENT = re.compile(r"(?i)\bfinal answer\b[*_]{0,2}\s*(?:is\b|:)[:*_]{0,3}")
_HASHES = re.compile(r"#{4}(?!#)")
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|\.?\s*I hope it is correct")
_CODE_BLOCK = re.compile(
    r"^[ \t]*(?P<fence>`{3,}+|~{3,}+)[^\n`]*\n(?P<code>.*?)^[ \t]*(?P=fence)[`~]*[ \t]*$", re.S | re.M
)
_MATH_SPAN = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


@dataclass(frozen=True)
class Reading:
    """How a text is read."""

    first: bool = False
    """Take the first stated answer, as for base models, which continue into the next problem; else the last."""
    stop: tuple[str, ...] = ()
    """With `first`: texts at which the output is truncated before it is read."""
    pattern: str | None = None
    """A regular expression that finds the answer: its last match (with `first`, its first), the first group."""


def after_thinking(output: str, opened: bool = False) -> str | None:
    """What follows the last "</think>", or the whole output where there is no thinking.

    `opened` says that the prompt ended in "<think>", as some chat templates have it. None for thinking that never
    ended: such an output has no answer.
    """
    _, closed, rest = output.rpartition(CLOSE_TAG)
    return None if _OPENED.search(rest) or (opened and not closed) else rest


def opens_thinking(prompt: str) -> bool:
    """Whether the model's output after `prompt` begins inside its thinking."""
    return prompt.rstrip().endswith(OPEN_TAG)


def readable(text: str, reading: Reading) -> str | None:
    """The part of `text` (without its thinking) that is searched for the answer; None without the pattern in it."""
    if reading.first:
        text = text[: min((i for stop in reading.stop if (i := text.find(stop)) >= 0), default=len(text))]
    if reading.pattern is None:
        return text
    matches = list(re.finditer(reading.pattern, text))
    if not matches:
        return None
    match = matches[0 if reading.first else -1]
    return match[1 if match.re.groups else 0]


def boxes(text: str) -> list[str]:
    """The contents of every balanced, non-empty \\boxed{} and \\fbox{}, by the place where they end; the number or the
    letter after one without braces. Of a box that holds nothing but a box, the inner one counts."""
    found: list[str] = []
    depth: list[re.Match[str] | None] = []  # per open brace: the box that it begins, or None for a plain brace
    last = (0, 0)  # where the last box begins and ends
    for token in _BOX_TOKEN.finditer(text):
        if token["bare"]:
            found.append(token["bare"].rstrip(".,"))
        elif token["box"]:
            depth.append(token if token[0].startswith(_BOX_NAMES) else None)
        elif token["open"]:
            depth.append(None)
        elif token["close"] and depth and (box := depth.pop()) is not None:
            content = text[box.end() : token.start()].strip()
            if content and content != text[slice(*last)]:
                found.append(content)
            if content:
                last = box.start(), token.end()
    return found


def has_box(text: str) -> bool:
    """Whether a box was begun, balanced or not: then what is outside of it is no answer."""
    return any(name in text for name in _BOX_NAMES)


def statements(text: str) -> list[str]:
    """What follows every "answer is" or "Answer:" up to the end of its sentence; "final answer is" takes precedence."""
    matches = list(_FINAL_STATEMENT.finditer(text)) or list(_STATEMENT.finditer(text))
    sentences = (_sentence(text[match.end() : match.end() + 2000]) for match in matches)
    return [boxed[-1] if (boxed := boxes(sentence)) else sentence for sentence in sentences if sentence]


def after_hashes(text: str) -> list[str]:
    """The rest of the line after every "####", which GSM8K puts before its answers."""
    return [text[match.end() : match.end() + 200].partition("\n")[0].strip() for match in _HASHES.finditer(text)]


def math_span(text: str) -> str | None:
    """From the first to the last piece of mathematics ($...$) in `text`, which keeps "$3$ or $4$" together.

    The minus of -$3$ is in it.
    """
    spans = list(_MATH_SPAN.finditer(text))
    if not spans:
        return None
    start = spans[0].start()
    return text[start - 1 if re.search(r"(?<!\S)[-−]$", text[:start]) else start : spans[-1].end()]


def last_chunk(text: str, start: int, end: int) -> str:
    """The mathematics or word around text[start:end], right of its last "=": not the 2 of $x = 3\\sqrt{2}$ alone."""
    for span in _MATH_SPAN.finditer(text):
        if span.start() <= start and end <= span.end():
            inner = next(group for group in span.groups() if group is not None)
            return inner.rpartition("=")[2].strip()
    before, after = re.search(r"\S*$", text[:start]), re.match(r"\S*", text[end:])
    assert before is not None and after is not None
    chunk = before[0] + text[start:end] + after[0]
    return chunk.rpartition("=")[2].strip("*_\"'`,;:?()[]").rstrip(".!")


def last_code_block(text: str) -> str | None:
    """The content of the last closed fenced block (``` or ~~~); None where there is none."""
    blocks = [match["code"] for match in _CODE_BLOCK.finditer(text.replace("\r\n", "\n"))]
    return blocks[-1] if blocks else None


def _sentence(text: str) -> str:
    """The first sentence; a full stop within mathematics does not end it."""
    text = text.lstrip(" \t\n*_:") if text.strip() else ""
    spans = [match.span() for match in _MATH_SPAN.finditer(text)]
    for end in _SENTENCE_END.finditer(text):
        if not any(start <= end.start() < stop for start, stop in spans):
            return text[: end.start()].strip()
    return text.strip()
