"""Running one step of a study, under the supervision of jobs/task.py: `python -m megatron_tpt.studies FOLDER`."""

import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from megatron_tpt.errors import UserError
from megatron_tpt.files import append_line, appended_lines, write_json
from megatron_tpt.jobs.task import shell_exit_code
from megatron_tpt.json_data import read_object
from megatron_tpt.names import first_few
from megatron_tpt.processes import end_with_parent
from megatron_tpt.provenance import git_revision
from megatron_tpt.studies.code_version import code_of
from megatron_tpt.studies.expand import Node, fingerprint
from megatron_tpt.studies.folders import DONE, SPEC, differing, is_done, outputs
from megatron_tpt.studies.measured import measured

logger = logging.getLogger(__name__)

_ATTEMPTS = "attempts.jsonl"


def write_spec(node: Node) -> None:
    """Write what `run_step` needs into the folder of a node, which is then a step that has begun."""
    config = node.config
    began_with = read_object(node.folder / SPEC).get("code", node.code)
    write_json(
        node.folder / SPEC,
        {
            "step": node.step,
            "levels": node.levels,
            "key": node.key,
            "command": node.command(),
            "words": node.words,
            "launcher": config.launcher,
            "directory": os.getcwd(),
            "before": {before.name: str(before.folder) for before in node.before.values()},
            "inputs": node.inputs,
            "code": began_with,
            # Of a step that began with other code and resumes with the present one (--code keep).
            "code_now": {} if node.code == began_with else node.code,
            "more_code": config.code,
            "outputs": config.outputs,
            "clean": config.clean,
            "measured_tokens": config.cost.measured_tokens if config.cost else None,
        },
    )


def run_step(folder: Path) -> int:
    """Run the command of a step, unless it has succeeded; returns its exit code.

    Raises UserError when a step before it has not succeeded, when inputs or code have changed since the study was
    started, and when the command has not written what it must.
    """
    spec = read_object(folder / SPEC)
    if is_done(folder):
        return 0
    for name, before in spec["before"].items():
        if not is_done(Path(before)):
            raise UserError(f"{name} has not succeeded, and this step needs it: see the logs in {before}/logs")
    os.chdir(spec["directory"])  # where relative paths lead from, wherever a job begins
    _require_unchanged(spec)
    if spec["clean"]:
        for path in outputs(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / DONE).unlink(missing_ok=True)  # of a run whose output was removed: what is written now is not yet whole
    began = datetime.now(UTC).isoformat(timespec="seconds")
    code = _run(folder, spec, began)
    if code == 0:
        if missing := [name for name in spec["outputs"] if not (folder / "output" / name).exists()]:
            raise UserError(f"the command ended well and has not written {missing[0]} in {folder / 'output'}")
        if not outputs(folder) and any("\0output\0" in word for word in spec["words"]):
            raise UserError(f"the command ended well and has written nothing to its {{output}}, {folder / 'output'}")
        write_json(folder / DONE, _record(folder, spec, began))
    return code


def _require_unchanged(spec: Mapping[str, Any]) -> None:
    """A job may wait for days: what it runs must be what its key says."""
    now = {path: fingerprint(Path(path)) if os.path.exists(path) else "" for path in spec["inputs"]}
    files = [*differing(now, spec["inputs"])]
    files += differing(code_of(spec["words"], spec["more_code"]), spec["code_now"] or spec["code"])
    if files:
        raise UserError(f"changed since the study was started: {first_few(files, 5)}; start it again, and it says what "
                        f"that means for this step")  # fmt: skip


def _run(folder: Path, spec: Mapping[str, Any], began: str) -> int:
    """Run the command; returns its exit code. On SIGTERM, which the supervisor also sends to the command, the time
    that it took is still recorded."""
    append_line(folder / _ATTEMPTS, orjson.dumps({"began": began}))
    start = time.monotonic()
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)
    try:
        done = subprocess.run(
            [*spec["launcher"], sys.executable, *spec["command"]],
            # With this process, or it would write on while the same step runs again.
            preexec_fn=functools.partial(end_with_parent, signal.SIGKILL),
        )
    except OSError as error:
        raise UserError(f"{error.filename} cannot be started ({error.strerror}): correct `launcher`") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    code = shell_exit_code(done.returncode)
    append_line(folder / _ATTEMPTS, orjson.dumps({"seconds": time.monotonic() - start, "exit_code": code}))
    return code


def _record(folder: Path, spec: dict[str, Any], began: str) -> dict[str, Any]:
    seconds = list(appended_lines(folder / _ATTEMPTS, lambda seconds, exit_code: float(seconds)))
    return {
        "began": began,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "hours": sum(seconds) / 3600,
        "attempts": len(list(appended_lines(folder / _ATTEMPTS, lambda began: began))),
        "outputs": [path.name for path in outputs(folder)],
        "host": socket.gethostname(),
        "python": sys.version.partition(" ")[0],
        "revision": git_revision(),
        **_measured(folder, spec),
    }


def _measured(folder: Path, spec: dict[str, Any]) -> dict[str, float | None]:
    """Tokens and FLOPs. Where they are not known, planned ones stay: the work itself is done."""
    try:
        return measured(spec["command"], folder / "output", spec["measured_tokens"])
    except (UserError, OSError, ValueError) as error:
        logger.warning(f"the cost of the step is not measured: {error}")
        return {}
