"""Pre-trains as megatron_tpt.pretrain does, but is killed where the checkpoint of step 4 gets its names.

The argument --kill=CALL:MOMENT says where: before or after the rename of its folder or the replacing of `latest`.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from megatron_tpt import pretrain
from megatron_tpt.config.cli import run


def kill_at(name: str, moment: str) -> None:
    """Have this process be killed at a call of os.NAME that names the checkpoint, or `latest` after it."""
    real: Callable[..., Any] = getattr(os, name)

    def deadly(source: Any, target: Any, **options: Any) -> None:
        is_link = os.path.islink(source) and os.readlink(source) == "step_00000004"
        is_due = is_link if name == "replace" else os.path.basename(target) == "step_00000004"
        if is_due and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **options)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, deadly)


if __name__ == "__main__":
    option = next(argument for argument in sys.argv if argument.startswith("--kill="))
    sys.argv.remove(option)
    kill_at(*option.removeprefix("--kill=").split(":"))
    run(pretrain.main)
