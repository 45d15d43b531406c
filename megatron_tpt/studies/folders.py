"""The folders of a study's steps, and the state of each.

    OUTPUT/STEP/LEVELS-KEY-CODE/step.json     the command, its inputs, its code, and the steps before it
                               /output...     what the command writes
                               /logs/         its output and its exit code; a lock while it runs
                               /done.json     written when it has succeeded: when, where, revision, cost

A step with other settings, or with other code, has another folder: nothing is overwritten, and what was run with
earlier settings is found again when they are restored.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_tpt.jobs.lock import is_task_locked
from megatron_tpt.jobs.report import TaskFiles
from megatron_tpt.json_data import read_object
from megatron_tpt.studies.expand import Graph, Node, label

SPEC, DONE, LOGS = "step.json", "done.json", "logs"
State = Literal["done", "running", "failed", "blocked", "waiting"]
STATES: tuple[State, ...] = get_args(State)
OfCode = Literal["any", "present"]
"""Whether what other code has run, or begun, counts."""


def place(graph: Graph, output: Path, of_code: OfCode) -> dict[str, Path]:
    """Set the folder of every node; returns, by key, the folders of nodes of which only other code has run anything.

    The newest of these folders is taken with `of_code` "any", a finished one first; otherwise a new one.
    """
    known = {step: _folders(output / step) for step in {node.step for node in graph.nodes.values()}}
    other: dict[str, Path] = {}
    for node in graph.nodes.values():
        code = [sorted(node.code.items()), sorted(before.code_key for before in node.before.values())]
        node.code_key = hashlib.sha256(json.dumps(code).encode()).hexdigest()[:6]
        found = known[node.step].get(node.key, {})
        node.folder = found.get(node.code_key) or output / node.step / f"{label(node)}-{node.key}-{node.code_key}"
        if node.code_key not in found and found:
            code_key = max(found, key=lambda name: (is_done(found[name]), (found[name] / SPEC).stat().st_mtime_ns))
            other[node.key] = found[code_key]
            if of_code == "any":
                node.folder, node.code_key = found[code_key], code_key
    return other


def _folders(folder: Path) -> dict[str, dict[str, Path]]:
    """Key: version of the code: the folder, of those that have been begun."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if len(parts := path.name.rsplit("-", 2)) == 3 and (path / SPEC).is_file():
            found.setdefault(parts[1], {})[parts[2]] = path
    return found


def is_done(folder: Path) -> bool:
    """Whether a step has succeeded."""
    return (folder / DONE).is_file()


def done_record(node: Node) -> dict[str, Any]:
    """What was recorded when a node had succeeded; empty if it has not."""
    return read_object(node.folder / DONE)


def states(graph: Graph) -> dict[str, State]:
    """The state of every node by key. `blocked`: a step before it has failed; `waiting` includes SLURM's queue, and
    what was stopped."""
    found: dict[str, State] = {}
    for node in graph.nodes.values():
        if is_done(node.folder):
            found[node.key] = "done"
        elif is_task_locked(node.folder / LOGS, 0):
            found[node.key] = "running"
        elif any(found[key] in ("failed", "blocked") for key in node.before):
            found[node.key] = "blocked"
        else:
            code = TaskFiles(node.folder / LOGS, 0).read_exit_code()
            found[node.key] = "failed" if code and code != 75 else "waiting"  # 75: stopped early, resumes
    return found


def changed_files(node: Node, folder: Path) -> Iterator[str]:
    """The files in which the code of a node differs from that recorded in a folder."""
    before: Mapping[str, str] = read_object(folder / SPEC).get("code", {})
    yield from sorted(name for name in {**before, **node.code} if before.get(name) != node.code.get(name))
