"""Running the project's own command lines, for the examples of a checkout: each is shown as a user would type it, its
output goes to a log."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.logs import print_result

REPOSITORY = Path(__file__).resolve().parents[2]


class Commands:
    """Runs python commands from the repository's root, with one thread each by default."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.start = time.monotonic()
        log_dir.mkdir(parents=True, exist_ok=True)

    def python(self, name: str, *arguments: str | Path, num_threads: int = 1) -> None:
        """Run `python ARGUMENTS`; its output goes to the log `name`. Raises UserError naming the log when it fails."""
        # Relative to the repository, where the command runs: shorter to read.
        command = [sys.executable, *(str(argument).replace(f"{REPOSITORY}/", "") for argument in arguments)]
        self.say(f"$ {shlex.join(['python', *command[1:]])}")
        start = time.monotonic()
        log_path = self.log_dir / f"{name}.log"
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
        with log_path.open("wb") as log:
            code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log).returncode
        if code:
            lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            reason = errors[-1] if errors else "\n".join(lines[-15:])
            raise UserError(f"{name} ended with exit code {code}; its output is in {log_path}\n{reason}")
        self.say(f"  {name}: done in {time.monotonic() - start:.0f} s")

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print_result(f"[{time.monotonic() - self.start:4.0f} s] {text}")


def empty_earlier(output: Path, mark: str) -> None:
    """Remove the folder of an earlier run, which has the file `mark`. Raises UserError for a folder with anything else
    in it."""
    if output.exists():
        if any(output.iterdir()) and not (output / mark).is_file():
            raise UserError(f"{output}: is no folder of an earlier run and not empty; choose another --output")
        shutil.rmtree(output)
