"""A small job of the shape that `megatron_tpt.jobs` runs: without --task it runs all its tasks, with it that one.

Task I writes OUTPUT/part-0000I.txt and is finished when that is there. OUTPUT/runs.jsonl says when which task ran. The
task named by --fault-task goes wrong in the way that --fault says until OUTPUT/fixed exists.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_tpt.config.cli import run
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write
from megatron_tpt.jobs.lock import task_lock
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.run import run_tasks


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--meet", type=int, default=0, help="continue once this many tasks have started")
    parser.add_argument("--fault", choices=["fail", "kill", "user_error", "hang", "ignore_sigterm", "leave_child"])
    parser.add_argument("--fault-task", type=int, default=-1)
    parser.add_argument("--scale", type=json.loads, default={}, help="fields of ScaleOptions")
    parser.add_argument("--task", type=int)
    parser.add_argument("--num-tasks", type=int)
    arguments = parser.parse_args()
    if arguments.task is None:
        command = [sys.executable, *without_scale(sys.argv)]
        output = arguments.output
        options = ScaleOptions(**arguments.scale)
        report = run_tasks(command, options, output / "logs", is_finished=lambda task: part(output, task).exists())
        return report.exit_code
    with task_lock(arguments.output, arguments.task):
        if not part(arguments.output, arguments.task).exists():
            work(arguments)
    return 0


def without_scale(argv: list[str]) -> list[str]:
    if "--scale" not in argv:
        return list(argv)
    place = argv.index("--scale")
    return argv[:place] + argv[place + 2 :]


def part(output: Path, task: int) -> Path:
    return output / f"part-{task:05d}.txt"


def work(arguments: argparse.Namespace) -> None:
    output, task = arguments.output, arguments.task
    note(output, task, "start")
    if task == arguments.fault_task and not (output / "fixed").exists():
        go_wrong(arguments.fault, output)
    while num_starts(output) < arguments.meet:
        time.sleep(0.05)
    time.sleep(arguments.seconds)
    with atomic_write(part(output, task)) as temporary:
        temporary.write_text(f"part {task} of {arguments.num_tasks}\n")
    note(output, task, "end")


def note(output: Path, task: int, event: str) -> None:
    entry = {"task": task, "event": event, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
    with open(output / "runs.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\n")


def num_starts(output: Path) -> int:
    return (output / "runs.jsonl").read_text().count('"start"')


def go_wrong(fault: str, output: Path) -> None:
    match fault:
        case "fail":
            raise RuntimeError("the shelf is empty")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "user_error":
            raise UserError("the shelf has no name: give it one")
        case "hang":
            time.sleep(600)
        case "ignore_sigterm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("deaf", flush=True)
            time.sleep(600)
        case "leave_child":
            child = subprocess.Popen(["sleep", "600"])
            (output / "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
