"""Files called .json: lines of JSON, arrays of objects, or objects written over several lines, all read as lines.

Everything streams. An element of an array, or an object over several lines, becomes one line, so that its number in
messages is its place in the array.
"""

import re
from collections.abc import Iterator

from megatron_tpt.records.limits import max_record_bytes
from megatron_tpt.records.record import DamagedSource

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OUTSIDE_STRINGS = re.compile(rb'["{}\[\],\n]')
_INSIDE_STRINGS = re.compile(rb'["\\]')
_SPACE = re.compile(rb"\s*")


def as_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a .json file as lines of JSON. Raises DamagedSource where an array or object does not end."""
    head, first_line = _head(chunks)
    if not head:
        return
    is_array = head.startswith(b"[")
    if not is_array and not first_line.rstrip().endswith((b"{", b"[", b",", b":")):
        yield head
        yield from chunks
        return
    splitter = _Splitter(is_array)
    yield splitter.feed(head)
    for chunk in chunks:
        yield splitter.feed(chunk)
    if splitter.is_open:
        raise DamagedSource(f"damaged or truncated (its JSON {'array' if is_array else 'object'} does not end)")


def _head(chunks: Iterator[bytes]) -> tuple[bytes, bytes]:
    """The file from its first character that is no space to the end of a chunk, and the first line of that."""
    head = b""
    while len(head) <= len(_BYTE_ORDER_MARK) and (chunk := next(chunks, b"")):
        head = (head + chunk).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not head.startswith(b"{"):
        return head, b""
    parts, size = [head], len(head)
    while b"\n" not in parts[-1] and size <= max_record_bytes() and (chunk := next(chunks, b"")):
        parts.append(chunk)
        size += len(chunk)
    head = b"".join(parts)
    return head, head.partition(b"\n")[0]


class _Splitter:
    """Finds where records end, and puts newlines there and nowhere else."""

    def __init__(self, is_array: bool) -> None:
        self._is_array = is_array
        self._depth = 0
        self._in_string = False
        self._skip = 0  # bytes of the next chunk that an escape at the end of the last one covers

    @property
    def is_open(self) -> bool:
        """Whether what was fed ends inside an array or object."""
        return self._depth > 0 or self._in_string

    def feed(self, chunk: bytes) -> bytes:
        """The next bytes of the file, as lines."""
        parts: list[bytes] = []
        copied, place = 0, self._skip
        while match := (_INSIDE_STRINGS if self._in_string else _OUTSIDE_STRINGS).search(chunk, place):
            place = match.end()
            token = match[0]
            if self._in_string:
                self._in_string = token != b'"'
                place += token == b"\\"
            elif token == b'"':
                self._in_string = True
            elif (written := self._replaced(token)) != token:
                parts += [chunk[copied : match.start()], written]
                if written.endswith(b"\n"):
                    place = _SPACE.match(chunk, place).end()  # type: ignore[union-attr]  # it matches anything
                copied = place
        self._skip = max(place - len(chunk), 0)
        parts.append(chunk[copied:])
        return b"".join(parts)

    def _replaced(self, token: bytes) -> bytes:
        """One character of JSON's structure."""
        if token == b"\n":
            return b" "
        if token == b",":
            return b"\n" if self._is_array and self._depth == 1 else token
        if token in b"{[":
            self._depth += 1
            return b"" if self._is_array and self._depth == 1 and token == b"[" else token
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return token
        return b"\n" if self._is_array else token + b"\n"
