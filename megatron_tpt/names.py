"""Names of files as messages show them, the names that cannot be used, and seeds that follow from a name."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_tpt.errors import UserError

_UNUSABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, bytes that are no UTF-8, separators of lines
_JOINERS = "\u200c\u200d"  # parts of words and of emoji


def shown(text: str | os.PathLike[str]) -> str:
    """A name or untrusted text on one line, safe for a terminal and a log: control characters, those that change the
    direction of text or cannot be seen, and bytes that are no UTF-8 are \\x.. and \\u.... escapes."""
    text = os.fspath(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_shown_character, text))


def shown_lines(text: str) -> str:
    """The same for a text of several lines; tabs stay."""
    return "\n".join("\t".join(map(shown, line.split("\t"))) for line in text.split("\n"))


def first_few(names: Sequence[str], most: int) -> str:
    """The first names of many, and how many more there are: "a, b and 7 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """A number of things: "1 sample", "1,319 samples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seed_of(name: str) -> int:
    """A seed for what has this name, the same wherever and whenever it is asked: 0 <= seed < 2**63."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def require_usable(path: Path, real_path: Path) -> None:
    """Raise UserError when a path, or what it leads to, cannot be written into manifests and messages."""
    for name in (str(path), str(real_path)):
        if problem := _problem(name):
            raise UserError(f"{shown(name)}: the name {problem}; rename the file or folder (mv)")


def require_utf8(arguments: Iterable[str]) -> None:
    """Raise UserError for an argument of the command line that is not UTF-8: no manifest could hold it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{shown(argument)}: not UTF-8; give another name") from None


def _problem(name: str) -> str | None:
    if name.isascii() and name.isprintable():
        return None
    kinds = set(map(unicodedata.category, name)) & _UNUSABLE
    if not kinds:
        return None
    return "is not UTF-8" if "Cs" in kinds else "holds control characters"


def _shown_character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind not in _UNUSABLE and (kind != "Cf" or character in _JOINERS):
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
