"""Running one step of a study, under the supervision of jobs/task.py: `python -m megatron_tpt.studies FOLDER`."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.provenance import git_revision
from megatron_tpt.files import append_line, appended_lines, write_json
from megatron_tpt.jobs.task import shell_exit_code
from megatron_tpt.json_data import read_object
from megatron_tpt.studies.expand import Node
from megatron_tpt.studies.folders import DONE, SPEC, is_done

logger = logging.getLogger(__name__)

_ATTEMPTS = "attempts.jsonl"


def write_spec(node: Node) -> None:
    """Write what `run_step` needs into the folder of a node, which is then a step that has begun."""
    config = node.config
    write_json(
        node.folder / SPEC,
        {
            "step": node.step,
            "levels": node.levels,
            "key": node.key,
            "command": node.command(),
            "launcher": config.launcher,
            "directory": os.getcwd(),
            "before": {before.name: str(before.folder) for before in node.before.values()},
            "inputs": node.inputs,
            "code": node.code,
            "outputs": config.outputs,
            "clean": config.clean,
            "measured_tokens": config.cost.measured_tokens if config.cost else None,
        },
    )


def run_step(folder: Path) -> int:
    """Run the command of a step, unless it has succeeded; returns its exit code.

    Raises UserError when a step before it has not succeeded, and when the command has not written what it must.
    """
    spec = read_object(folder / SPEC)
    if is_done(folder):
        return 0
    for name, before in spec["before"].items():
        if not is_done(Path(before)):
            raise UserError(f"{name} has not succeeded, and this step needs it: see the logs in {before}/logs")
    if spec["clean"]:
        for path in folder.glob("output*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    began, start = datetime.now(UTC), time.monotonic()
    done = subprocess.run([*spec["launcher"], sys.executable, *spec["command"]], cwd=spec["directory"])
    code = shell_exit_code(done.returncode)
    attempt = {"seconds": time.monotonic() - start, "exit_code": code}
    append_line(folder / _ATTEMPTS, orjson.dumps(attempt))
    if code == 0:
        if missing := [name for name in spec["outputs"] if not (folder / "output" / name).exists()]:
            raise UserError(f"the command ended well and has not written {missing[0]} in {folder / 'output'}")
        write_json(folder / DONE, _record(folder, spec, began))
    return code


def _record(folder: Path, spec: dict[str, Any], began: datetime) -> dict[str, Any]:
    seconds = list(appended_lines(folder / _ATTEMPTS, lambda seconds, exit_code: float(seconds)))
    tokens, flops = _measure(folder, spec)
    return {
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "hours": sum(seconds) / 3600,
        "attempts": len(seconds),
        "tokens": tokens,
        "flops": flops,
        "host": socket.gethostname(),
        "python": sys.version.partition(" ")[0],
        "revision": git_revision(),
    }


def _measure(folder: Path, spec: dict[str, Any]) -> tuple[float | None, float | None]:
    """Tokens and FLOPs; None where they are not known, and planned ones stay: the work itself is done."""
    if spec["measured_tokens"] is None and not any(word.startswith("megatron_tpt.") for word in spec["command"]):
        return None, None
    from megatron_tpt.studies.costs import measured_tokens_and_flops  # takes time, and most steps say nothing

    try:
        return measured_tokens_and_flops(spec["command"], folder / "output", spec["measured_tokens"])
    except (UserError, OSError, ValueError) as error:
        logger.warning(f"the cost of the step is not measured: {error}")
        return None, None
