"""Runs a command so that nothing of it outlives this process or its parent, however they end.

    python -m megatron_tpt.generation.keeper PARENT_PID COMMAND...

A server that is killed leaves the processes that it started behind: they fall to the keeper, which ends them.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

from megatron_tpt.processes import end_with_parent

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_POLL_S = 0.5
_GRACE_S = 10.0


def main() -> int:
    """Returns the command's exit code; 143 when it was asked to stop, or the parent is gone."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: end_with_parent(signal.SIGTERM))
    try:
        while os.getppid() == parent:
            code = child.poll()
            if code is not None:
                return code if code >= 0 else 128 - code
            time.sleep(_POLL_S)
        return 143
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
    while rest := psutil.Process().children(recursive=True):  # killed ones leave theirs to us
        for process in rest:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(rest, timeout=1.0)


if __name__ == "__main__":
    sys.exit(main())
