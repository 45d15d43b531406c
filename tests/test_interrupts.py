"""Ctrl-C at any moment, from the first import of a program on, ends it quietly."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PROGRAMS = {
    **{path.name: f"runpy.run_path({str(path)!r}, run_name='__main__')" for path in (ROOT / "tools").glob("*.py")},
    **{name: f"from {place.replace(':', ' import ')}; command()" for name, place in SCRIPTS.items()},
    **{f"-m {m}": f"runpy.run_module({m!r}, run_name='__main__', alter_sys=True)" for m in
       ("megatron_tpt.pretrain", "megatron_tpt.finetune")},
}  # fmt: skip
INTERRUPTED_AT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may have been started in the background
class Interrupts:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts)
sys.argv = ["program"]
{program}
"""


@pytest.mark.parametrize("module", ["dataclasses", "megatron_tpt.config.cli", "annotated_types"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_while_a_program_is_imported_ends_it_quietly(name: str, module: str) -> None:
    code = INTERRUPTED_AT.format(module=module, program=PROGRAMS[name])
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (process.returncode, process.stderr) == (-2, "")


def test_programs_get_interrupts_as_exceptions_once_they_run() -> None:
    code = "import signal, megatron_tpt.tools.index; print(signal.getsignal(signal.SIGINT).__name__)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == "default_int_handler\n"
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code.replace('.__name__', '.name')}"
    process = subprocess.run([sys.executable, "-c", ignoring], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == "SIG_IGN\n", "as a shell starts what runs in the background"


INTERRUPTED_IN_CLEAN_UP = """
import os, signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from megatron_tpt import interrupts
from megatron_tpt.config.cli import run
from megatron_tpt.errors import StoppedEarly, Terminated
from megatron_tpt.processes import terminations_raised

def interrupt(*_):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    for _ in range(1000): pass

class Old:
    __del__ = interrupt

def work():
    if sys.argv[1] == "__del__":
        Old()
    else:
        old = type("Old", (), {})()
        watcher = weakref.ref(old, interrupt)
        del old
    time.sleep(30)

def main():
    try:
        with terminations_raised():
            work()
    except Terminated:
        raise StoppedEarly("terminated")

run(main)
"""


@pytest.mark.parametrize("where", ["__del__", "weak reference"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_signal_while_python_cleans_up_is_not_lost(where: str, name: str, code: int) -> None:
    command = [sys.executable, "-c", INTERRUPTED_IN_CLEAN_UP, where, name]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (process.returncode, process.stderr) == (code, "")
