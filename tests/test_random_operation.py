"""Minutes of random operation over the tools and the training programs: wrong input, wrong options, kills, full disks.

RANDOM_OPERATION_SEED=7 RANDOM_OPERATION_SECONDS=600 pytest -s -m slow tests/test_random_operation.py
RANDOM_OPERATION_SEED=7 RANDOM_OPERATION_ONLY=31,42 pytest -s -m slow tests/test_random_operation.py      # again

Each operation begins with fresh inputs and depends on the seed and its number alone, but for the moments of kills.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from random_inputs import damage_arguments, damage_file, write_inputs
from random_operations import OPERATIONS, Operation, input_files
from random_server import Server
from small_disk import small_disk
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tpt import interrupts
from megatron_tpt.interop.checkpoint_reader import CheckpointReader

SEED = int(os.environ.get("RANDOM_OPERATION_SEED", time.time_ns() % 1_000_000))
DURATION_S = float(os.environ.get("RANDOM_OPERATION_SECONDS", 600))
ONLY = [int(number) for number in os.environ.get("RANDOM_OPERATION_ONLY", "").split(",") if number]
LIMIT_S = 120
MAX_ADDRESS_SPACE = 12 << 30
# Imported once: a program that is forked from the server starts in a tenth of a second.
PRELOADED = [
    "megatron_tpt.corpus.prepare", "megatron_tpt.indexing.index", "megatron_tpt.indexing.pack_sft",
    "megatron_tpt.thinking.augment", "megatron_tpt.interop.hf_import", "megatron_tpt.training.trainer",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
# What records when, how fast and by which process, and not what was made.
# The inventory lists files in the order in which they were finished.
NOT_COMPARED = {"heartbeat.json", ".lock", "lock", "logs", ".work", ".inventory", "checkpoints"}
ONLY_NAMES = {"README.md", "checksums.json", "starts.jsonl"}
FULL = r"the disk is full|No space left on device|make room"
METRICS = ("step", "loss", "loss_document", "loss_thinking", "loss_answer", "grad_norm", "learning_rate", "tokens")


def _run(argv: list[str], box: Path, is_cold: bool) -> None:
    """The child: become the program that `argv` names for python, with all output in one file."""
    os.setsid()
    os.chdir(box)
    output = os.open(box.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR2, sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    importlib.reload(interrupts)  # the server imported it, and ignores Ctrl-C
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    os.environ |= {"HOME": str(box.parent), "TMPDIR": str(box.parent / "tmp"), "PYTHONUNBUFFERED": "1"}
    (box.parent / "started").touch()
    if is_cold:
        os.execv(sys.executable, [sys.executable, *argv])
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


class Wrong(Exception):
    """A promise that was not kept."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and every link with where it leads."""
    found = {str(path): path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return {n: os.readlink(p).encode() if p.is_symlink() else p.read_bytes() for n, p in found.items()}


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder, but for times and speeds; of the checkpoints of a run the values in the last."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.name == "latest":
            found[str(name)] = _tensors(path)
        elif path.is_symlink():
            found[str(name)] = f"-> {os.readlink(path)}"
        elif path.name == ".metadata" and "checkpoints" not in name.parts:
            found[str(name)] = _tensors(path.parent)
        elif path.is_file() and not NOT_COMPARED & set(name.parts) and path.suffix != ".distcp":
            content = b"" if path.name in ONLY_NAMES else path.read_bytes()
            if path.name == "metrics.jsonl":
                rows = map(json.loads, content.splitlines())
                content = json.dumps([[row.get(metric) for metric in METRICS] for row in rows]).encode()
            found[str(name)] = hashlib.sha256(content).hexdigest()[:12]
    return found


def _tensors(checkpoint: Path) -> str:
    """The bytes of a checkpoint's tensors; the files around them are other ones each time."""
    reader = CheckpointReader(checkpoint)
    total = hashlib.sha256()
    for key, entry in sorted(FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            total.update(key.encode() + reader.read(key).numpy().tobytes())
    return total.hexdigest()[:12]


class Driver:
    """Runs operations in `folder`, one after another; each method raises Wrong for what must not be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.box, self.pristine = folder, folder / "box", folder / "pristine"
        self.out = self.box / "out"
        self.url = Server().url
        self._references: dict[str, tuple[dict[str, str], float]] = {}
        self.box.mkdir()
        write_inputs(self.box)
        shutil.move(self.box, self.pristine)
        self.fresh()
        thoughts = next(one for one in OPERATIONS if one.name == "augment")
        expect(self.finish(self.start(thoughts.arguments(self.url))) == 0, self.output())
        shutil.copytree(self.out / "job", self.pristine / "thought")

    def fresh(self) -> None:
        shutil.rmtree(self.box, ignore_errors=True)
        shutil.copytree(self.pristine, self.box, symlinks=True)
        self.out.mkdir()
        (self.folder / "output").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / "tmp").mkdir()

    def output(self) -> str:
        path = self.folder / "output"
        return path.read_bytes().decode(errors="backslashreplace") if path.exists() else ""

    def start(self, arguments: tuple[list[str], list[str]], *, is_cold: bool = False) -> ForkServerProcess:
        program, rest = arguments
        process = CONTEXT.Process(
            target=_run, args=([*program, *rest], self.box, is_cold or "torch.distributed.run" in program)
        )
        (self.folder / "started").unlink(missing_ok=True)
        process.start()
        while process.exitcode is None and not (self.folder / "started").exists():
            time.sleep(0.01)
        return process

    def finish(self, process: ForkServerProcess) -> int:
        """Its exit code. It and all that it started are gone then."""
        process.join(LIMIT_S)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR2)
            process.join(2)
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise Wrong(f"still running after {LIMIT_S} s")
        deadline = time.monotonic() + 30
        while (orphans := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for orphan in orphans:
            orphan.kill()
        expect(not orphans, f"processes left: {orphans}")
        return process.exitcode

    def _processes(self) -> list[psutil.Process]:
        """Those that work in the box: what a program starts inherits its working directory."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(self.box):
                    found.append(process)
        return found

    def reference(self, operation: Operation) -> tuple[dict[str, str], float]:
        """The digests of an undisturbed output, and how long it takes to make."""
        if operation.command not in self._references:
            started = time.monotonic()
            code = self.finish(self.start(operation.arguments(self.url)))
            expect(code == 0, f"exit code {code} of an undisturbed run")
            self._references[operation.command] = digests(self.out), time.monotonic() - started
            operation.check(self.out)
            left = [name for name in os.listdir(self.folder / "tmp") if not name.startswith("torchelastic_")]
            expect(not left, f"temporary files left: {left}")
            self.fresh()
        return self._references[operation.command]

    def judge(self, operation: Operation, code: int) -> None:
        """What holds for every program that ran to its own end."""
        output = self.output()
        expect("Traceback (most recent" not in output, "a traceback")
        expect(code in (0, *operation.mistake_codes), f"exit code {code}")
        if code == 2:
            errors = [line for line in output.splitlines() if line.startswith(("error: ", "╭─ "))]
            expect(len(errors) == 1, f"{len(errors)} messages: {errors}")
            expect(len(errors[0]) < 2000, "a message of more than 2,000 characters")
        if code == 0 and (self.out / "job").exists() | (self.out / "job.idx").exists() | (self.out / "run").exists():
            operation.check(self.out)

    def same_again(self, operation: Operation) -> None:
        """The same command completes what an interruption left, to the bit."""
        expected, _ = self._references[operation.command]
        (self.folder / "output").unlink(missing_ok=True)
        code = self.finish(self.start(operation.arguments(self.url)))
        now = digests(self.out)
        is_done = code == 2 and now == expected  # killed after its end: there is nothing to do
        expect(code == 0 or is_done, f"exit code {code} of the same command")
        expect("Traceback (most recent" not in self.output(), "a traceback")
        different = {name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name)}
        expect(not different, f"differs from an undisturbed run: {sorted(different)}")


# Faults: each is given the driver and an operation whose inputs are fresh, and says what it does.


def wrong_input(driver: Driver, operation: Operation, rng: random.Random) -> Iterator[str]:
    for path in rng.sample(files := input_files(driver.box, operation), min(len(files), rng.choice([1, 1, 1, 2]))):
        yield f"{path.relative_to(driver.box)} {damage_file(path, rng)}"
    before = contents(driver.box)
    code = driver.finish(driver.start(operation.arguments(driver.url)))
    yield f"exit code {code}"
    driver.judge(operation, code)
    expect(before.items() <= contents(driver.box).items(), "an input was changed")


def wrong_options(driver: Driver, operation: Operation, rng: random.Random) -> Iterator[str]:
    program, arguments = operation.arguments(driver.url)
    arguments = damage_arguments(arguments, operation.options(), rng)
    yield ascii(" ".join(arguments))
    before = contents(driver.box)
    code = driver.finish(driver.start((program, arguments)))
    yield f"exit code {code}"
    driver.judge(operation, code)
    expect(before.items() <= contents(driver.box).items(), "an input was changed")


def interrupted(driver: Driver, operation: Operation, rng: random.Random) -> Iterator[str]:
    _, duration = driver.reference(operation)
    was_cold = False
    for _ in range(rng.choice([1, 1, 2, 3])):
        is_cold = rng.random() < 0.1
        was_cold |= is_cold
        process = driver.start(operation.arguments(driver.url), is_cold=is_cold)
        while rng.random() < 0.2:
            process.join(rng.uniform(0, duration))
            _signal(process, signal.SIGSTOP, os.killpg)
            process.join(rng.uniform(0, 2))
            _signal(process, signal.SIGCONT, os.killpg)
            yield "STOP, CONT"
        process.join(rng.uniform(0, duration))
        signum = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        sender = rng.choice([os.kill, os.killpg]) if signum != signal.SIGINT else os.killpg
        if _signal(process, signum, sender):
            yield f"{signum.name} to {'it' if sender is os.kill else 'its group'}"
        code = driver.finish(process)
        yield f"exit code {code}"
        allowed = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143, 75), signal.SIGINT: (-2, 130)}[signum]
        output = driver.output()
        # Python's own end on Ctrl-C, before the first line of a program; torchrun's, always.
        is_pythons = was_cold and "KeyboardInterrupt" in output and "megatron_tpt" not in output
        is_others = "torch." in operation.command or is_pythons
        # What had its end already has 0, or 2 where a finished output is refused.
        expect(code in (*allowed, 0, 2) or (is_others and code == 1), f"exit code {code}")
        expect("Traceback (most recent" not in output or is_others, "a traceback")
    driver.same_again(operation)


def _signal(process: ForkServerProcess, signum: signal.Signals, sender=os.kill) -> bool:
    if process.exitcode is not None:
        return False
    try:
        sender(process.pid, signum)
    except ProcessLookupError:  # its group: it has just been forked, or has just ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)
    return True


def full_disk(driver: Driver, operation: Operation, rng: random.Random) -> Iterator[str]:
    expected, _ = driver.reference(operation)
    size = int(4096 * rng.uniform(1, 3 * len(expected)) + rng.choice([0, 0, 400_000, 2_000_000]))
    driver.out.rmdir()
    with small_disk(driver.out, size):
        code = driver.finish(driver.start(operation.arguments(driver.url)))
        yield f"{size:,} bytes: exit code {code}"
        if code == 0:
            return
        output = driver.output()
        is_torchrun = "torch." in operation.command  # it ends with 1 and a traceback of its own
        expect(is_torchrun or "Traceback (most recent" not in output, "a traceback")
        expect(is_torchrun or code == 2, f"exit code {code} on a full disk")
        expect(re.search(FULL, output) is not None, "no word of the full disk")
        subprocess.run(["mount", "-o", "remount,size=64m", str(driver.out)], check=True)
        driver.same_again(operation)


def started_twice(driver: Driver, operation: Operation, rng: random.Random) -> Iterator[str]:
    _, duration = driver.reference(operation)
    first = driver.start(operation.arguments(driver.url))
    first.join(rng.uniform(0, duration))
    second = driver.start(operation.arguments(driver.url))
    second.join(LIMIT_S)
    codes = (driver.finish(first), driver.finish(second))
    yield f"exit codes {codes}"
    expect(0 in codes and set(codes) <= {0, 2}, f"exit codes {codes}")
    expect("Traceback (most recent" not in driver.output(), "a traceback")
    driver.same_again(operation)


FAULTS = {wrong_input: 8, wrong_options: 8, interrupted: 4, full_disk: 1.5, started_twice: 1}


def operate(driver: Driver, number: int) -> tuple[str, str | None]:
    """Do the operation of a number. Returns what was done, and what was wrong with it."""
    rng = random.Random(f"{SEED} {number}")
    fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
    is_mistake = fault in (wrong_input, wrong_options)
    possible = [one for one in OPERATIONS if not is_mistake or one.is_light]
    operation = rng.choices(possible, [one.weight for one in possible])[0]
    driver.fresh()
    done, wrong = [], None
    started = time.monotonic()
    try:
        for step in fault(driver, operation, rng):
            done.append(step)
    except Exception as error:
        wrong = f"{error if isinstance(error, Wrong) else traceback.format_exc(limit=-2)}\n  " + "\n  ".join(
            driver.output().splitlines()[-25:]
        )
    what = f"{number}: {operation.command.split(' --')[0]}: {fault.__name__}: {'; '.join(done)}"
    return f"{what} ({time.monotonic() - started:.1f} s)", wrong


@pytest.mark.slow(minutes=10)
@pytest.mark.timeout(DURATION_S + 1200)
def test_random_operation_keeps_what_is_promised(tmp_path: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if os.geteuid() != 0:
        FAULTS.pop(full_disk)  # nobody else may mount a small file system
    driver = Driver(tmp_path)
    print(f"\nRANDOM_OPERATION_SEED={SEED}")
    deadline = time.monotonic() + DURATION_S
    failures: list[str] = []
    counts: Counter[str] = Counter()
    for number in ONLY or itertools.count():
        if time.monotonic() > deadline:
            break
        what, wrong = operate(driver, number)
        counts[what.split(": ")[2]] += 1
        print(f"{what}{'  WRONG: ' + wrong if wrong else ''}", flush=True)
        if wrong:
            failures.append(f"{what}: {wrong}")
    print(dict(counts))
    assert not failures, f"RANDOM_OPERATION_SEED={SEED}: {len(failures)} failures\n" + "\n".join(failures)
