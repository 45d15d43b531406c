"""Paths that match a pattern such as "data/**/*.jsonl", linked folders followed, also where links lead back."""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_tpt.files import file_key


def matching(pattern: Path) -> tuple[list[Path], list[Path]]:
    """The paths that match, sorted, and the links that were not followed because they lead back to a folder above.

    The rules are those of `glob.glob(recursive=True)`, which never ends where several links lead back.
    """
    if "**" not in pattern.parts:
        return sorted(map(Path, glob.iglob(str(pattern)))), []
    place = pattern.parts.index("**")
    top, rest = Path(*pattern.parts[:place]), pattern.parts[place:]
    loops: list[Path] = []
    tops = map(Path, glob.iglob(str(top))) if glob.has_magic(str(top)) else [top]
    return sorted(path for each in tops for path in _below(each, rest, loops)), loops


def _below(top: Path, patterns: Sequence[str], loops: list[Path]) -> Iterator[Path]:
    """What matches below a folder. Puts links that lead back into `loops`."""
    has_hidden = any(pattern.startswith(".") for pattern in patterns)
    above = {str(top): frozenset([file_key(top)])} if top.is_dir() else {}
    for place, folders, names in os.walk(top, followlinks=True):
        folder = Path(place)
        keys = above.pop(str(folder))
        for name in list(folders):
            path = folder / name
            if name.startswith(".") and not has_hidden:
                folders.remove(name)
            elif (key := file_key(path)) in keys:
                loops.append(path)
                folders.remove(name)
            else:
                above[str(path)] = keys | {key}
        parts = folder.relative_to(top).parts
        yield from (folder / name for name in (*folders, *names) if matches((*parts, name), patterns))


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which "**" matches any number of folders."""
    if not patterns:
        return not names
    first, rest = patterns[0], patterns[1:]
    if first == "**" and matches(names, rest):
        return True
    if not names or (names[0].startswith(".") and not first.startswith(".")):
        return False
    if first == "**":
        return matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], first) and matches(names[1:], rest)
