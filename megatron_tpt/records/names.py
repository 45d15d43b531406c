"""Names of files as messages show them, and the names that cannot be used."""

import os
import unicodedata
from pathlib import Path

from megatron_tpt.errors import UserError

_UNUSABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, bytes that are no UTF-8, separators of lines


def shown(path: str | os.PathLike[str]) -> str:
    """The path on one line, with bytes that are no UTF-8 and control characters as \\\\x.. escapes."""
    return "".join(map(_shown_character, os.fspath(path)))


def require_usable(path: Path, real_path: Path) -> None:
    """Raise UserError when a path, or what it leads to, cannot be written into manifests and messages."""
    for name in (str(path), str(real_path)):
        if name.isascii() and name.isprintable():
            continue
        kinds = set(map(unicodedata.category, name))
        if kinds & _UNUSABLE:
            problem = "is not UTF-8" if "Cs" in kinds else "holds control characters"
            raise UserError(f"{shown(name)}: the name {problem}: rename the file or folder (mv)")


def _shown_character(character: str) -> str:
    if unicodedata.category(character) not in _UNUSABLE:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
