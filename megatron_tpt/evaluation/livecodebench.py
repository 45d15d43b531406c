"""LiveCodeBench's files as problems: prompts, and tests that this package's sandbox runs.

python -m megatron_tpt.evaluation.livecodebench --input test4.jsonl test5.jsonl --output DATA_DIR/livecodebench.jsonl

The files are those of livecodebench/code_generation_lite on the Hub; its versions v4 and v5, as in arXiv 2509.20186,
are test4.jsonl and test5.jsonl. A program reads its input and writes its output, or completes a class. Both are
compared as the official script does (github.com/LiveCodeBench, `testing_util.py`): lines without blanks around them,
else as decimal numbers; values as JSON. Its hidden tests are pickled texts, which are read without running any code.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.logs import print_result
from megatron_tpt.records import describe, expand_sources, json_lines, read_rows

CASE_LIMIT_S = 6
"""Processor time for one test of a problem: the official limit of time."""
_MAX_TEST_BYTES = 1 << 30
_BAD = (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, zlib.error, pickle.UnpicklingError)
_FROM_INPUT = (
    "Write a Python program that reads this input from stdin and writes the answer to stdout. Do not test it on the "
    "examples. Give the whole program in one block of Python code."
)
_FROM_STARTER = "Complete this code, and give the whole of it in one block of Python code.\n\n```python\n{code}\n```"
_PREAMBLE = """\
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json
import math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
sys.setrecursionlimit(50000)
exit = quit = sys.exit
"""
"""What the official script puts before a program, as the site does where the problems come from."""
_TESTS = """\
# program
import decimal, io, json, os, signal, sys, tempfile

class TooSlow(BaseException): pass

def too_slow(*_): raise TooSlow

def numbers(line):
    try: return [decimal.Decimal(word) for word in line.split()]
    except decimal.InvalidOperation: return None

def same(text, expected):
    ours, theirs = ([line.strip() for line in each.strip().split("\\n")] for each in (text, expected))
    return len(ours) == len(theirs) and all(
        a == b or (numbers(a) is not None and numbers(a) == numbers(b)) for a, b in zip(ours, theirs))

def output_of(code, text):
    with tempfile.TemporaryFile() as given:
        given.write(text.encode())
        given.seek(0)
        os.dup2(given.fileno(), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        written = io.BytesIO()
        sys.stdout = shown = io.TextIOWrapper(written, "utf-8", write_through=True)
        try: exec(code, {"__name__": "__main__"})
        except SystemExit: pass
        finally: os.dup2(NOTHING, 0)  # programs that open(0) close it
        shown.flush()
        return written.getvalue().decode(errors="replace")

def value_of(code, text):
    names = {"__name__": "answer"}
    exec(code, names)
    given = [json.loads(line) for line in text.split("\\n")]
    value = getattr(names["Solution"](), FUNCTION)(*given) if "Solution" in names else names[FUNCTION](*given)
    return json.loads(json.dumps(value))  # a tuple is a list

NOTHING = os.open(os.devnull, os.O_RDONLY)
signal.signal(signal.SIGPROF, too_slow)
code = compile(PREAMBLE + program, "<answer>", "exec")
for number, (text, expected) in enumerate(CASES):
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    if FUNCTION is None: right = same(output_of(code, text), expected)
    else: right = value_of(code, text) == json.loads(expected)
    signal.setitimer(signal.ITIMER_PROF, 0)
    assert right, f"test {number} of {len(CASES)}"
"""


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and where to."""

    input: list[str]
    """LiveCodeBench's files."""
    output: Path
    """The file to write; --benchmark livecodebench expects livecodebench.jsonl in its --data-dir."""


class _Texts(pickle.Unpickler):
    """Reads what was pickled of texts, and nothing that would import or call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no text")


def read_cases(text: str) -> list[dict[str, str]]:
    """The tests in a column: JSON, or JSON that was pickled, packed and written in base64. Raises ValueError."""
    try:
        cases = json.loads(text)
    except ValueError:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(text), _MAX_TEST_BYTES)
        if inflater.unconsumed_tail:
            raise ValueError("more than 1 GiB of tests") from None
        cases = json.loads(_Texts(io.BytesIO(raw)).load())
    if not isinstance(cases, list) or not all({"input", "output", "testtype"} <= case.keys() for case in cases):
        raise ValueError("not a list of tests with input, output and testtype")
    return cases


def problem_of(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of LiveCodeBench as a problem with `id`, `prompt` and `tests`. Raises ValueError or KeyError."""
    cases = [*read_cases(row["public_test_cases"]), *read_cases(row["private_test_cases"])]
    function = json.loads(row["metadata"]).get("func_name")
    kinds = {case["testtype"] for case in cases}
    if kinds != {"stdin" if function is None else "functional"}:
        raise ValueError(f"tests of the kinds {', '.join(sorted(kinds))} for the function {function}")
    task = _FROM_INPUT if function is None else _FROM_STARTER.replace("{code}", row["starter_code"].strip())
    payload = json.dumps([[case["input"], case["output"]] for case in cases])
    marker, body = _TESTS.split("\n", 1)
    named = f"FUNCTION, LIMIT_S, PREAMBLE = {function!r}, {CASE_LIMIT_S}, {_PREAMBLE!r}"
    return {
        "question_id": row["question_id"],
        "prompt": f"{row['question_content'].strip()}\n\n{task}",
        "tests": f"{marker}\nimport json\n{named}\nCASES = json.loads({payload!r})\n{body}",
        "contest_date": str(row.get("contest_date", "")),
    }


def convert(options: ConvertOptions) -> int:
    """Write the problems; returns their number. Raises UserError that names the row of a bad one."""
    number = 0
    with json_lines(options.output) as add:
        for source in expand_sources(options.input):
            for row in read_rows(source):
                if row.value is None:
                    raise UserError(describe(source, row, "fetch the file again"))
                try:
                    problem = problem_of(row.value)
                except _BAD as error:
                    raise UserError(
                        f"{source.name}:{row.number + 1}: not a row of LiveCodeBench ({error!r})"
                    ) from error
                add(json.dumps(problem).encode())
                number += 1
    return number


def main() -> None:
    options = parse(ConvertOptions, description=__doc__)
    print_result(f"{options.output}: {convert(options):,} problems")


if __name__ == "__main__":
    run(main)
