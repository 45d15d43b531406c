"""Ctrl-C while a program is still being imported ends it by the signal, without a traceback.

The modules of programs import this before anything that takes time; `config.cli.program`, called at their end, gives
Ctrl-C back to Python.
"""

import signal
import threading

_before = signal.getsignal(signal.SIGINT)
_applies = _before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
if _applies:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def restore() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, where it did before."""
    global _applies
    if _applies:
        signal.signal(signal.SIGINT, _before)
        _applies = False
