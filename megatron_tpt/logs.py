"""What programs say: their results by `print_result`, all else through `logging`.

A module has `logger = logging.getLogger(__name__)`: `info` for progress and notes, `warning` for what may not be as it
was meant, `error` for what ends a process that cannot raise. `configure` shows these lines, and programs alone call it
(config/cli.py:run): to who imports the package as a library, its loggers are those of any library.
"""

import logging
import os
import sys
from collections.abc import Callable

from megatron_tpt.errors import UserError
from megatron_tpt.names import shown_lines

LEVEL_VARIABLE = "MEGATRON_TPT_LOG_LEVEL"
"""The environment variable with the least level that is shown: info where it is not set."""
ALL_RANKS = {"all_ranks": True}
"""`logger.info(..., extra=ALL_RANKS)` is shown on every rank: without it, what is no error is shown on the first alone,
as all ranks find the same."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# The log of a training run is all that it prints; elsewhere standard output is for results.
_ON_STDOUT = ("megatron_tpt.recipes", "megatron_tpt.studies", "megatron_tpt.training")
_logger = logging.getLogger("megatron_tpt")


def configure() -> None:
    """Show what the package logs. Raises UserError for an unknown level in MEGATRON_TPT_LOG_LEVEL."""
    name = os.environ.get(LEVEL_VARIABLE) or "info"
    if name not in _LEVELS:
        raise UserError(f"{LEVEL_VARIABLE}={name}: not a level; give one of {', '.join(_LEVELS)}")
    formatter = _Formatter("%(asctime)s %(name)s: %(message)s" if name == "debug" else "%(message)s")
    _logger.handlers = [_Handler("stdout", formatter), _Handler("stderr", formatter)]
    _logger.setLevel(_LEVELS[name])
    _logger.propagate = False  # a library that gives the root logger a handler would have every line twice


def for_worker() -> Callable[[], None]:
    """What a worker process that is spawned calls first, to show what it logs as this process does (one that is forked
    does so anyway)."""
    return configure if _logger.handlers else _leave


def print_result(*values: object, end: str = "\n") -> None:
    """Print a part of what a program was called for."""
    print(*values, end=end, flush=True)


def print_error(text: str) -> None:
    """Print why a program ends: whatever the level, and in the form that other programs look for."""
    print(f"error: {text}", file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    """Prints what belongs on one of the standard streams, to what that stream is at that moment. Raises what print
    raises, as where the disk that holds the log is full.

    Each stream has its own, with its own lock: a thread can report an error while another hangs in standard output.
    """

    def __init__(self, stream: str, formatter: logging.Formatter) -> None:
        super().__init__()
        self._stream = stream
        self.setFormatter(formatter)

    def filter(self, record: logging.LogRecord) -> bool:
        is_error = record.levelno >= logging.ERROR
        is_shown = is_error or _rank() == "0" or hasattr(record, "all_ranks")
        stream = "stdout" if record.name.startswith(_ON_STDOUT) and not is_error else "stderr"
        return is_shown and stream == self._stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


class _Formatter(logging.Formatter):
    """Puts the rank (but the first) and the level (but info) before a message, and escapes what would act on a
    terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        rank = "" if _rank() == "0" else f"[rank {_rank()}] "
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.message = f"{rank}{level}{shown_lines(record.message)}"
        return super().formatMessage(record)


def _rank() -> str:
    """By torchrun's variable, which is there before torch is; `training.launchers` sets it under other launchers."""
    return os.environ.get("RANK", "0")


def _leave() -> None: ...
