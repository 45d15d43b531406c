"""Sizes as users write them ("1GiB", "500MB"), and durations as they read them ("3 h 05 min")."""

import re

from megatron_tpt.errors import UserError

MIB, GIB = 1 << 20, 1 << 30

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40}


def num_bytes(option: str, text: str) -> int:
    """The number of bytes that "1GiB", "500 MB" or "4096" means. Raises UserError naming `option`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise UserError(f"{option} {text!r}: give a size such as 500MB or 2GiB")
    return size


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "12 min", "3 h 05 min", "2 d 07 h"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
