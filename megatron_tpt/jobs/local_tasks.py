"""Tasks as processes of this machine."""

import contextlib
import logging
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from megatron_tpt.errors import Terminated, UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.report import TaskFiles, TaskResult
from megatron_tpt.jobs.task import LOCKED_EXIT_CODE, shell_exit_code, supervised_command
from megatron_tpt.names import counted
from megatron_tpt.processes import terminations_raised

logger = logging.getLogger(__name__)


def run_local(
    command: Sequence[str], options: ScaleOptions, log_dir: Path, is_finished: Callable[[int], bool]
) -> list[TaskResult]:
    """Run the tasks that are not finished, several at once, each with its own GPUs; returns all results."""
    environments = worker_environments(options)
    tasks, results = tasks_to_run(options, log_dir, is_finished)
    if tasks:
        of_all = f"{len(tasks)} of {counted(options.num_tasks, 'task')}"
        logger.info(f"{of_all} to run, {len(environments)} at once; logs in {log_dir}")
    pool = _Pool(command, options.num_tasks, log_dir, tasks)
    with sigterm_as_exit(), contextlib.closing(pool.run(environments)) as ended_tasks:
        for result in ended_tasks:
            results[result.task] = result
            announce(result, options.num_tasks)
    return list(results.values())


def tasks_to_run(
    options: ScaleOptions, log_dir: Path, is_finished: Callable[[int], bool]
) -> tuple[list[int], dict[int, TaskResult]]:
    """The tasks that are not finished, and the results of the others."""
    tasks = [task for task in range(options.num_tasks) if not is_finished(task)]
    return tasks, {task: finished_before(task, log_dir) for task in set(range(options.num_tasks)) - set(tasks)}


def finished_before(task: int, log_dir: Path) -> TaskResult:
    """The result of a task that was finished before."""
    return TaskResult(task, "finished", TaskFiles(log_dir, task).log)


def ended(task: int, exit_code: int, log_dir: Path) -> TaskResult:
    """The result of a task whose supervisor ended with `exit_code`."""
    state = {0: "finished", LOCKED_EXIT_CODE: "not run"}.get(exit_code, "failed")
    return TaskResult(task, state, TaskFiles(log_dir, task).log, exit_code)  # type: ignore[arg-type]


def announce(result: TaskResult, num_tasks: int) -> None:
    """Report the result of a task as soon as it is known."""
    text = f"task {result.task} of {num_tasks} {result.describe()}"
    if result.exit_code == LOCKED_EXIT_CODE:
        text += ": another process is running it"
    elif result.exit_code == 2:
        text += f": {TaskFiles(result.log_path.parent, result.task).user_error()}; no further tasks start"
    elif result.state == "failed":
        text += f": {result.log_path}"
    logger.log(logging.WARNING if result.state == "failed" else logging.INFO, text)


def worker_environments(options: ScaleOptions) -> list[dict[str, str]]:
    """Additional environment variables for the tasks of each worker: its share of the GPUs."""
    common = {}
    if options.cpus_per_task is not None and "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(options.cpus_per_task)
    if options.gpus_per_task == 0:
        return [common] * (options.num_workers or 1)
    gpus = _visible_gpus()
    num_workers = options.num_workers or max(len(gpus) // options.gpus_per_task, 1)
    if num_workers * options.gpus_per_task > len(gpus):
        raise UserError(
            f"{num_workers} tasks at once with {options.gpus_per_task} GPUs each need more than the {len(gpus)} GPUs "
            "that this machine shows: lower num_workers or gpus_per_task"
        )
    shares = [gpus[i * options.gpus_per_task : (i + 1) * options.gpus_per_task] for i in range(num_workers)]
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []


class _Pool:
    """Workers that take tasks in order; each runs one at a time. A worker is a thread that waits for its process."""

    def __init__(self, command: Sequence[str], num_tasks: int, log_dir: Path, tasks: Sequence[int]) -> None:
        self._command = command
        self._num_tasks = num_tasks
        self._log_dir = log_dir
        self._waiting = deque(tasks)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._lock = threading.Lock()  # held while starting a task or setting _stopping
        self._ended: queue.Queue[TaskResult | BaseException | None] = queue.Queue()

    def run(self, environments: Sequence[dict[str, str]]) -> Generator[TaskResult]:
        """Yield the result of each task when it ends, and finally those of tasks that did not start."""
        threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in environments]
        for thread in threads:
            thread.start()
        try:
            num_working = len(threads)
            while num_working:
                match self._ended.get():
                    case None:
                        num_working -= 1
                    case BaseException() as fault:
                        raise fault
                    case result:
                        yield result
            for task in self._waiting:
                yield TaskResult(task, "not run", TaskFiles(self._log_dir, task).log)
        finally:
            self._stop()
            self._end_processes(threads)

    def _work(self, environment: dict[str, str]) -> None:
        try:
            while (started := self._start_next(environment)) is not None:
                task, process = started
                code = shell_exit_code(process.wait())
                self._processes.discard(process)
                if code == 2:
                    self._stop()
                self._ended.put(ended(task, code, self._log_dir))
        except BaseException as fault:  # raised again in the main thread
            self._ended.put(fault)
        self._ended.put(None)

    def _start_next(self, environment: dict[str, str]) -> tuple[int, subprocess.Popen[bytes]] | None:
        with self._lock:
            if self._stopping or not self._waiting:
                return None
            task = self._waiting.popleft()
            which = ["--task", str(task), "--parent", str(os.getpid())]
            line = supervised_command(self._command, self._num_tasks, self._log_dir, *which)
            # In its own process group: Ctrl-C only reaches this process, which then ends the tasks.
            process = subprocess.Popen(line, env=os.environ | environment, stdin=subprocess.DEVNULL, process_group=0)
            self._processes.add(process)
            return task, process

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True

    def _end_processes(self, threads: Sequence[threading.Thread]) -> None:
        """Tell the supervisors of running tasks to end them, again whenever the user presses Ctrl-C."""
        while self._processes:
            for process in list(self._processes):
                process.terminate()
            with contextlib.suppress(KeyboardInterrupt):
                for process in list(self._processes):
                    process.wait()
                for thread in threads:
                    thread.join()


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that tasks are ended in the same way as on Ctrl-C."""
    try:
        with terminations_raised():
            yield
    except Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
