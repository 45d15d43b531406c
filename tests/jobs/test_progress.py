"""How far a job is: one place on a terminal, lines in a log, and nothing that a killed process leaves behind."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from megatron_tpt import logs
from megatron_tpt.jobs import progress
logs.configure()
progress._TERMINAL_EVERY_S = 0.01
with progress.ProgressLine(0.01) as line:
    for i in range(3):
        time.sleep(0.02)
        line.show(lambda: f"{i} of 3 items")
        if i == 1:
            print("warning: item 1 is odd", file=sys.stderr)
            print("result")
print("3 items", file=sys.stderr)
"""


def test_in_a_log_every_step_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr == "0 of 3 items\n1 of 3 items\nwarning: item 1 is odd\n2 of 3 items\n3 items\n"
    assert done.stdout == "result\n"


def test_on_a_terminal_the_line_stays_in_its_place_below_what_is_printed(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with (tmp_path / "stdout").open("w") as file:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=file, stderr=theirs, env=environment)
        os.close(theirs)
        written = b""
        try:
            while data := os.read(ours, 1 << 16):
                written += data
        except OSError:  # the other end is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    assert (tmp_path / "stdout").read_text() == "result\n"
    text = written.decode()
    assert shown_at_the_end(text) == ["warning: item 1 is odd", "3 items"]
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert text.index(visible) == text.index(hidden) + len(hidden), "the cursor is hidden while the job runs"


def shown_at_the_end(text: str) -> list[str]:
    """The lines of a terminal that knows what rich asks of it: carriage return, up, erase line."""
    lines, at, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)", text):
        if part == "\n":
            at, column = at + 1, 0
            lines += [""] * (at + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            lines[at] = ""
        elif not part.startswith("\x1b"):
            lines[at] = lines[at][:column] + part + lines[at][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]
