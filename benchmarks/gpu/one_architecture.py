"""Keep one GPU architecture's code in Transformer Engine's core library, and write its wheel again.

python -m benchmarks.gpu.one_architecture UNPACKED_WHEEL NEW_WHEEL

In every fat binary of the section .nv_fatbin the entries for sm_90 (and sm_90a) move together behind the header, the
header's size follows, and the rest becomes zeros. Addresses stay as they were; the zeros vanish when compressed. One
undefined symbol becomes weak: cuBLAS 13.1 lacks it, and Transformer Engine calls it only after a check for cuBLAS 13.3.
"""

import base64
import csv
import hashlib
import io
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "transformer_engine/wheel_lib/libtransformer_engine.so"
ARCHITECTURE = 90
_MAGIC, _WEAK = 0xBA55ED50, "cublasLtGroupedMatrixLayoutInit_internal"


def _sections(content: bytearray) -> dict[str, tuple[int, int]]:
    """Begin and end of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names = struct.unpack_from("<HHH", content, 0x3A)
    raw = [struct.unpack_from("<IIQQQQIIQQ", content, table + i * size) for i in range(count)]
    return {_text(content, raw[names][4] + one[0]): (one[4], one[4] + one[5]) for one in raw}


def _text(content: bytearray, offset: int) -> str:
    return bytes(content[offset : content.index(b"\0", offset)]).decode()


def _entries(content: bytearray, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Architecture and bytes of what a fat binary holds."""
    while begin < end:
        entry, payload = struct.unpack_from("<IQ", content, begin + 4)
        (architecture,) = struct.unpack_from("<I", content, begin + 28)
        yield architecture, bytes(content[begin : begin + entry + payload])
        begin += entry + payload
    if begin != end:
        raise ValueError(f"the fat binary that ends at {end:#x} has a layout that is not known here")


def keep_architecture(content: bytearray) -> tuple[int, int]:
    """Change a library in place. Returns the bytes of GPU code that were kept and removed."""
    position, end = _sections(content)[".nv_fatbin"]
    kept = removed = 0
    while position < end:
        if struct.unpack_from("<I", content, position)[0] != _MAGIC:
            position += 8  # padding between fat binaries
            continue
        header, length = struct.unpack_from("<HQ", content, position + 6)
        first = position + header
        keep = b"".join(code for of, code in _entries(content, first, first + length) if of == ARCHITECTURE)
        if not keep:
            raise ValueError(f"the fat binary at {position:#x} has nothing for sm_{ARCHITECTURE}")
        content[first : first + length] = keep + bytes(length - len(keep))
        struct.pack_into("<Q", content, position + 8, len(keep))
        kept, removed, position = kept + len(keep), removed + length - len(keep), first + length
    return kept, removed


def weaken(content: bytearray) -> None:
    """Let the library be loaded without the one symbol."""
    sections = _sections(content)
    strings = sections[".dynstr"][0]
    for symbol in range(*sections[".dynsym"], 24):
        name, info, _, section = struct.unpack_from("<IBBH", content, symbol)
        if section == 0 and info >> 4 == 1 and _text(content, strings + name) == _WEAK:
            content[symbol + 4] = 2 << 4 | info & 15  # global becomes weak


def write_wheel(folder: Path, wheel: Path) -> None:
    """A wheel of an unpacked one, with the library's new hash and size. Not compressed: xz does that better later."""
    library = (folder / LIBRARY).read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(library).digest()).rstrip(b"=").decode()
    record = next(folder.glob("*.dist-info/RECORD"))
    rows = list(csv.reader(record.read_text().splitlines()))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [row[0], f"sha256={digest}", str(len(library))] if row[0] == LIBRARY else row for row in rows
    )
    record.write_text(table.getvalue())
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder))


def main() -> None:
    folder, wheel = Path(sys.argv[1]), Path(sys.argv[2])
    content = bytearray((folder / LIBRARY).read_bytes())
    kept, removed = keep_architecture(content)
    weaken(content)
    (folder / LIBRARY).write_bytes(content)
    write_wheel(folder, wheel)
    print(f"kept {kept / 1e6:.1f} MB of GPU code, removed {removed / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
