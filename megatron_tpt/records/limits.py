"""How large one record may be: the same limit for lines and for rows of tables, in every tool."""

import functools
import os

from megatron_tpt.errors import UserError
from megatron_tpt.records.record import BadRecord
from megatron_tpt.units import num_bytes

VARIABLE = "MEGATRON_TPT_MAX_RECORD_SIZE"
"""The environment variable that sets another limit. Worker processes and SLURM tasks inherit it."""
DEFAULT_BYTES = 256 << 20
_MOST_BYTES = 1 << 30  # Arrow's strings and its JSON parser hold less than 2 GiB
TOO_LARGE = "record too large"


def max_record_bytes() -> int:
    """The largest record that is read, in bytes (unpacked); larger ones are bad records.

    Raises UserError for a limit in the environment that is no size, or more than 1 GiB.
    """
    return _parsed(os.environ.get(VARIABLE))


@functools.lru_cache(maxsize=4)
def _parsed(setting: str | None) -> int:
    if setting is None:
        return DEFAULT_BYTES
    limit = num_bytes(VARIABLE, setting)
    if limit > _MOST_BYTES:
        raise UserError(f"{VARIABLE}={setting}: at most 1GiB is possible; split larger documents")
    return limit


def too_large(size: int) -> BadRecord:
    """What is wrong with a record of `size` bytes that exceeds the limit."""
    limit = max_record_bytes()
    advice = "split the document"
    if size <= _MOST_BYTES:
        advice = f"set the environment variable {VARIABLE}={-(-size // (1 << 20))}MiB, or {advice}"
    return BadRecord(TOO_LARGE, f"({size:,} bytes, the limit is {limit:,}: {advice})")
