"""Sizes as users write them: "1GiB", "500MB"."""

import re

from megatron_tpt.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def num_bytes(option: str, text: str) -> int:
    """The number of bytes that "1GiB", "500 MB" or "4096" means. Raises UserError naming `option`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise UserError(f"{option} {text!r}: give a size such as 500MB or 2GiB")
    return size
