"""Distinguishes useless thoughts from useful ones by rules, without a model, and truncates unfinished ones at a
sentence.

`judge` sees what is plainly wrong: nothing written, a loop, another script or language, a refusal, a copy. It does not
judge whether a thought is true. A loop that changes a number in every round escapes where fewer than 8 words in a row
stay the same.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress, count, islice
from typing import Any

from megatron_tpt.languages import language
from megatron_tpt.thinking.filter_options import FilterOptions

REASONS = ("too_short", "refusal", "wrong_script", "wrong_language", "loop", "copy")
"""Why `judge` rejects."""

_NGRAM = 8
_LOOP_SHARE = 0.9
_DOCUMENT_SCRIPT_SHARE = 0.05

# Thai and Lao, Burmese, Khmer, kana, Han: written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Long runs are cut in pieces, so that "aaaa..." is many equal words, not one.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,32}}")
_NEEDS_CUTTING = re.compile(rf"[{_UNSPACED}]|\S{{33}}")
# Words by their letters and digits, however they are set: "5+14=19" has three.
_COUNTED = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{1,32}}")
_LETTERS = re.compile(r"[^\W\d_]+")
# A single Greek letter is mathematics, not Greek.
_LONE_GREEK = re.compile("(?<![\u0370-\u03ff])[\u0370-\u03ff](?![\u0370-\u03ff])")
_SCRIPT_OF_NAME = {"hiragana": "cjk", "katakana": "cjk", "bopomofo": "cjk"}

_DECLINE = (
    r"(?:can ?not|can'?t|could not|won't|will not|(?:am|'m) (?:unable|not able|not allowed|not permitted)(?: to)?|"
    r"(?:do not|don't) (?:feel comfortable|have the (?:ability|capability)))"
)
_TASK = (
    r"(?:help|assist|comply|fulfil+|provide|answer|respond|continue|create|generate|write|engage|participate|discuss|"
    r"do that|do this|process|access|complete|support|produce|share|offer|simulate|analy[sz]e)"
)
_APOLOGY = r"(?:i(?:'m| am) (?:\w+ )?sorry|sorry|my apologies|i apologi[sz]e|as an ai\b)"
_REFUSAL = re.compile(
    r"\W*(?:(?:okay|ok|hmm|well|unfortunately|sadly)\W+)*(?:"
    rf"{_APOLOGY}[^.!?]{{0,80}}?[.!?]?[^.!?]{{0,40}}?\bi ?(?:{_DECLINE})\s+(?:\w+ ){{0,3}}?{_TASK}"
    r"|i (?:can ?not|can'?t|won't|will not|am unable to|am not able to) "
    r"(?:\w+ )?(?:help (?:you )?with|assist|comply|fulfil+|engage (?:in|with)))",
    re.IGNORECASE,
)

# Without their last full stop, as alternatives of a regular expression.
_ABBREVIATIONS = (
    "a.k.a|al|approx|ca|cf|ch|dept|dr|e.g|eds|eq|eqs|fig|figs|i.e|inc|jr|lem|ltd|mr|mrs|ms|nos|pp|prof|prop|resp|sec|"
    "sr|st|thm|u.k|u.s|vol|vs|w.l.o.g"
)
_ABBREVIATED = re.compile(rf"(?:^|[\s(\[\"'])(?:{_ABBREVIATIONS.replace('.', r'\.')})\.\Z", re.IGNORECASE)
_CLOSERS = re.compile(r"[\"'”’»)\]}*_]*")
_STOPPED = re.compile(rf"[.!?…]{_CLOSERS.pattern}\Z")
# The "2." that begins an item or a heading ends no sentence.
_NUMBERED = re.compile(r"(?:^|\n)[ \t>*#]*(?:[-+•][ \t]+)?\(?(?:\d+|[a-zA-Z])[.)]\Z")
_CJK_STOP = re.compile(r"[。！？]+[」』”’）】》]*")
_MARKER = r"[ \t]*(?:[-*+•][ \t]|\(?(?:\d+|[a-zA-Z])[.)][ \t]|\|)"
# The last line of a paragraph with the blank line after it, or any line of a list or table; but no heading, and nothing
# that leads over to what comes next.
_FINISHED_LINE = re.compile(
    r"^(?!#|\*\*.*\*\*$)(?:.*[^\s:,;][ \t]{0,3}\n[ \t]*\n"
    rf"|{_MARKER}.*[^\s:][ \t]{{0,3}}\n(?={_MARKER}|[ \t]*(?:\n|\Z)))",
    re.MULTILINE,
)
_FENCE = re.compile(r"[ \t]*(?P<fence>`{3}|~{3})")
_OPENING = re.compile(
    rf"^{_FENCE.pattern}|\$\$|(?<!\\)\\\[|\\begin\{{(?P<environment>[^{{}}\n]{{1,40}})\}}", re.MULTILINE
)


def judge(document: str, thinking: str, options: FilterOptions) -> str | None:
    """Why the thinking about `document` is rejected, or None when it is kept.

    The reasons, in the order in which they are looked for: "too_short", "refusal", "wrong_script", "wrong_language",
    "loop", "copy". `FilterOptions` says what each means and switches it off.
    """
    enough = max(1, options.min_words, options.max_refusal_words + 1)
    num_words = sum(1 for _ in islice(_COUNTED.finditer(thinking), enough))
    if num_words < max(1, options.min_words):
        return "too_short"
    if num_words <= options.max_refusal_words and is_refusal(thinking):
        return "refusal"
    if options.max_foreign_share < 1 and _foreign_share(document, thinking, options) > options.max_foreign_share:
        return "wrong_script"
    if options.languages and language(thinking) not in (None, *options.languages):
        return "wrong_language"
    words = split_words(thinking)
    if is_loop(words, options):
        return "loop"
    if options.max_copied_share < 1 and copied_share(split_words(document), words) > options.max_copied_share:
        return "copy"
    return None


def split_words(text: str) -> list[str]:
    """Words separated by spaces, in lower case, cut at 32 characters; single characters where there are no spaces."""
    text = text.lower()
    return _WORD.findall(text) if _NEEDS_CUTTING.search(text) else text.split()


def is_loop(words: Sequence[str], options: FilterOptions) -> bool:
    """Whether the words repeat themselves: on the whole, or at the end over and over."""
    times = _times_seen(words)
    if options.max_repeated_share < 1 and _share(words, times, least=1) > options.max_repeated_share:
        return True
    if not 0 < options.loop_words <= len(words):
        return False
    return _share(words[-options.loop_words :], times[-options.loop_words :], least=2) >= _LOOP_SHARE


def copied_share(document: Sequence[str], thinking: Sequence[str]) -> float:
    """The share of the thinking's characters in runs of 8 words that occur in the document."""
    wanted = set(_ngrams(document))
    copied = bytearray(len(thinking))
    for start in compress(count(), map(wanted.__contains__, _ngrams(thinking))):
        copied[start : start + _NGRAM] = b"\1" * _NGRAM
    return _share(thinking, copied, least=1)


def _times_seen(words: Sequence[str]) -> bytearray:
    """For every word how often a run of 8 words that it is in occurred before: 0, 1, or 2 for more."""
    counts: dict[tuple[str, ...], int] = {}
    times = bytearray(len(words))
    for start, ngram in enumerate(_ngrams(words)):
        seen = counts.get(ngram, 0)
        counts[ngram] = seen + 1
        if seen:
            for place in range(start, start + _NGRAM):
                times[place] = max(times[place], min(seen, 2))
    return times


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(islice(words, start, None) for start in range(_NGRAM)), strict=False)


def _share(words: Sequence[str], marks: bytes | bytearray, *, least: int) -> float:
    """The share of characters in the words whose mark is `least` or more."""
    marked = compress(words, (mark >= least for mark in marks))
    return sum(map(len, marked)) / (sum(map(len, words)) or 1)


def is_refusal(text: str) -> bool:
    """Whether an English text begins by declining to do what was asked: an apology and "I can't help", or the latter
    alone. Apologies and inabilities that are about something else do not count."""
    return _REFUSAL.match(text.replace("’", "'")) is not None


def script_letters(text: str) -> Counter[str]:
    """The number of letters by script ("latin", "cjk", "cyrillic", ...); lone Greek letters are not counted."""
    if text.isascii():
        return Counter(latin=sum(map(len, _LETTERS.findall(text))))
    letters: Counter[str] = Counter()
    for character, number in Counter(_LONE_GREEK.sub("", text)).items():
        if script := _script(character):
            letters[script] += number
    return letters


@cache
def _script(character: str) -> str | None:
    # Letters dressed up for mathematics or in full width are what they look like.
    character = unicodedata.normalize("NFKC", character)[0]
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split(" ")[0].lower()
    return _SCRIPT_OF_NAME.get(name, name) or None


def _foreign_share(document: str, thinking: str, options: FilterOptions) -> float:
    """The share of the thinking's letters in scripts that are not allowed."""
    letters = script_letters(thinking)
    if not options.scripts and letters.keys() <= {"latin"}:
        return 0.0
    allowed: set[str] = set(options.scripts)
    if not options.scripts:
        own = script_letters(document)
        allowed = {"latin"} | {script for script in own if own[script] >= _DOCUMENT_SCRIPT_SHARE * own.total()}
    return sum(letters[script] for script in letters.keys() - allowed) / (letters.total() or 1)


def cut_to_sentence(text: str) -> str:
    """`text`, which may end anywhere, up to its last whole sentence; "" when there is none.

    A sentence ends where Punkt (Kiss and Strunk 2006) says, given the usual abbreviations, and at a full stop of
    Chinese or Japanese. Also whole are a closed code block, a paragraph before a blank line and a line of a list or
    table, with the line breaks that prove it; but neither a heading nor what ends in a colon. A block or displayed
    formula that is left open is cut off with all that follows. The result is a prefix of `text` and is not changed by
    another cut.
    """
    blocks, end = _closed_blocks(text)
    text = text[:end]
    ends = [stop for start, stop in blocks if _FENCE.match(text, start)]
    ends += [match.end() for pattern in (_FINISHED_LINE, _CJK_STOP) for match in pattern.finditer(text)]
    ends += _punkt_ends(text)
    whole = (end for end in sorted(ends, reverse=True) if not any(start < end < stop for start, stop in blocks))
    return text[: next(whole, 0)]


def _closed_blocks(text: str) -> tuple[list[tuple[int, int]], int]:
    """Start and end of every closed code block and displayed formula, and where the first that is left open starts."""
    blocks: list[tuple[int, int]] = []
    position = 0
    while opening := _OPENING.search(text, position):
        if fence := opening["fence"]:
            closing = re.compile(rf"^[ \t]*{fence}+[ \t]*$", re.MULTILINE).search(text, opening.end())
            position = closing.end() if closing else -1
        else:
            mark = {"$$": "$$", "\\[": "\\]"}.get(opening[0], f"\\end{{{opening['environment']}}}")
            found = text.find(mark, opening.end())
            position = found + len(mark) if found >= 0 else -1
        if position < 0:
            return blocks, opening.start()
        blocks.append((opening.start(), position))
    return blocks, len(text)


def _punkt_ends(text: str) -> list[int]:
    """Where sentences end in a full stop, a question mark or an exclamation mark."""
    ends = []
    for _, end in _punkt().span_tokenize(text):
        end += len(_CLOSERS.match(text, end)[0])  # type: ignore[index]  # it matches the empty string, too
        before = text[max(0, end - 40) : end]
        followed = end == len(text) or text[end].isspace()
        if not followed or not _STOPPED.search(before) or _ABBREVIATED.search(before) or _NUMBERED.search(before):
            continue
        if not before[:-1][-1:].isdigit():
            ends.append(end)
        elif end < len(text):  # "3." may continue as 3.14: the space after it, which is kept, says that it does not
            ends.append(end + 1)
    return ends


@cache
def _punkt() -> Any:
    """A Punkt tokenizer that knows the abbreviations and has learnt nothing else: no data is downloaded."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types.update(_ABBREVIATIONS.split("|"))
    return PunktSentenceTokenizer(parameters)
