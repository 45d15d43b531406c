"""The signals that ask a run to stop."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals(_worker: int = 0) -> None:
    """For helper processes of a rank: they survive a signal to the whole job, and end when their rank does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
