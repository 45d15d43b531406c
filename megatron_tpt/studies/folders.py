"""The folders of a study's steps, and the state of each.

    OUTPUT/STEP/LEVELS-KEY-CODE/step.json     the command, its inputs, its code, and the steps before it
                               /output...     what the command writes
                               /logs/         its output and its exit code; a lock while it runs
                               /done.json     written when it has succeeded: when, where, revision, cost
    OUTPUT/study.yaml, last_run.json          the study that ran last, and which folders and inputs were its own

A step with other settings, or with other code, has another folder: nothing is overwritten, and what was run with
earlier settings is found again when they are restored.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_tpt.files import atomic_write, real_path, write_json
from megatron_tpt.jobs.lock import is_task_locked
from megatron_tpt.jobs.report import TaskFiles
from megatron_tpt.json_data import read_object
from megatron_tpt.studies.expand import Graph, Node, label

SPEC, DONE, LOGS = "step.json", "done.json", "logs"
_LAST_RUN = "last_run.json"
State = Literal["done", "running", "failed", "blocked", "waiting"]
STATES: tuple[State, ...] = get_args(State)
OfCode = Literal["last run", "any", "present"]
"""Which folder a step has: that of the last run if there is one; that of whatever code has run or begun it; only that
of the present code."""


def place(graph: Graph, output: Path, of_code: OfCode) -> dict[str, Path]:
    """Set the folder of every node; returns, by key, the folders of nodes that other code has run, or has left
    something of.

    With `of_code` "any", or "last run" where that did not have the node, the newest of these folders is taken, a
    finished one first; otherwise a new one.
    """
    known = {step: _folders(output / step) for step in {node.step for node in graph.nodes.values()}}
    last_run = read_object(output / _LAST_RUN).get("folders", {}) if of_code == "last run" else {}
    other: dict[str, Path] = {}
    for node in graph.nodes.values():
        code = [sorted(node.code.items()), sorted(before.code_key for before in node.before.values())]
        node.code_key = hashlib.sha256(json.dumps(code).encode()).hexdigest()[:6]
        found = known[node.step].get(node.key, {})
        if last_run.get(node.key) in found:
            node.code_key = last_run[node.key]
        elif node.code_key not in found:
            worth = {name: folder for name, folder in found.items() if _is_worth_keeping(node, folder)}
            if worth:
                newest = max(worth, key=lambda name: (is_done(worth[name]), (worth[name] / SPEC).stat().st_mtime_ns))
                other[node.key] = worth[newest]
                node.code_key = node.code_key if of_code == "present" else newest
        node.folder = found.get(node.code_key) or output / node.step / f"{label(node)}-{node.key}-{node.code_key}"
    return other


def _folders(folder: Path) -> dict[str, dict[str, Path]]:
    """Key: version of the code: the folder, of those that have been begun."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if len(parts := path.name.rsplit("-", 2)) == 3 and (path / SPEC).is_file():
            found.setdefault(parts[1], {})[parts[2]] = path
    return found


def _is_worth_keeping(node: Node, folder: Path) -> bool:
    """Whether a step has succeeded in a folder, or has left there what it resumes from."""
    return (folder / DONE).is_file() or (bool(outputs(folder)) and not node.config.clean)


def write_last_run(graph: Graph, study: Path, output: Path) -> None:
    """Record which folders the study has, and the fingerprints of its inputs: its report can then be made again after
    these have changed or gone."""
    if real_path(study) != (copy := output / "study.yaml"):
        with atomic_write(copy) as temporary:
            temporary.write_bytes(study.read_bytes())
    inputs = {path: digest for node in graph.nodes.values() for path, digest in node.inputs.items()}
    write_json(
        output / _LAST_RUN, {"folders": {key: node.code_key for key, node in graph.nodes.items()}, "inputs": inputs}
    )


def inputs_of_last_run(output: Path) -> dict[str, str]:
    """Path: fingerprint, of the inputs that the study had when it ran last."""
    inputs: dict[str, str] = read_object(output / _LAST_RUN).get("inputs", {})
    return inputs


def outputs(folder: Path) -> list[Path]:
    """What the command of a step has written: its {output}, and files that begin with it."""
    return sorted(folder.glob("output*"))


def is_done(folder: Path) -> bool:
    """Whether a step has succeeded, and what it wrote is there."""
    return (folder / DONE).is_file() and not lost(folder)


def lost(folder: Path) -> list[str]:
    """The outputs of a finished step that have been removed."""
    recorded = [*read_object(folder / DONE).get("outputs", [])]
    recorded += [f"output/{name}" for name in read_object(folder / SPEC).get("outputs", [])]
    return [name for name in recorded if not (folder / name).exists()]


def done_record(node: Node) -> dict[str, Any]:
    """What was recorded when a node had succeeded; empty if it has not."""
    return read_object(node.folder / DONE)


def states(graph: Graph) -> dict[str, State]:
    """The state of every node by key. `blocked`: a step before it has failed; `waiting` includes SLURM's queue, what
    was stopped, and what has to run again because its output was removed and a step that is not done needs it."""
    done = {key for key, node in graph.nodes.items() if is_done(node.folder)}
    needed = {wanted.node.key for wanted in graph.results}
    for key, node in reversed(graph.nodes.items()):  # those that need it stand behind it
        if key not in done and key not in needed and (node.folder / DONE).is_file():
            done.add(key)
        if key not in done:
            needed |= node.before.keys()
    found: dict[str, State] = {}
    for key, node in graph.nodes.items():
        if key in done:
            found[key] = "done"
        elif is_task_locked(node.folder / LOGS, 0):
            found[key] = "running"
        elif any(found[one] in ("failed", "blocked") for one in node.before):
            found[key] = "blocked"
        else:
            code = TaskFiles(node.folder / LOGS, 0).read_exit_code()
            found[key] = "failed" if code and code != 75 else "waiting"  # 75: stopped early, resumes
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[str]:
    """The names that two mappings give other values, or that only one has."""
    yield from sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def codes_of(folder: Path) -> list[dict[str, str]]:
    """Path: digest, of the code that a step has begun with, and of that which it was resumed with, if another."""
    spec = read_object(folder / SPEC)
    return [code for name in ("code", "code_now") if (code := spec.get(name))]


def changed_files(node: Node, folder: Path) -> Iterator[str]:
    """The files in which the code of a node differs from that recorded in a folder."""
    yield from differing(node.code, next(reversed(codes_of(folder)), {}))
