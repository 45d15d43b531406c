"""Ctrl-C ends a program quietly, at any moment; so does SIGTERM where a program has something to do first.

While it is still being imported, by the signal: the modules of programs import this before anything that takes time.
`config.cli.program`, called at their end, gives Ctrl-C back to Python, which raises KeyboardInterrupt; while Python
cleans up it cannot, and the signal is sent again.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from megatron_tpt.errors import Terminated

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_SIGNALS = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}

_before = signal.getsignal(signal.SIGINT)
_applies = _before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
if _applies:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def restore() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, where it did before, and no signal get lost."""
    global _applies
    sys.unraisablehook = _interrupt_again
    if _applies:
        signal.signal(signal.SIGINT, _before)
        _applies = False


def _interrupt_again(unraisable: "UnraisableHookArgs") -> None:
    """Python ignores exceptions in `__del__` and in callbacks of weak references, after a message: an interrupt that
    came there would be lost."""
    if unraisable.exc_type not in _SIGNALS:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.02, os.kill, (os.getpid(), _SIGNALS[unraisable.exc_type]))  # when we are out of there
    again.daemon = True
    with contextlib.suppress(RuntimeError):  # the interpreter is about to end anyway
        again.start()
