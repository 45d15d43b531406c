"""`make demo`, with fewer documents and problems: every step is the same."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--num-documents", "2000", "--num-thoughts", "500", "--num-sft", "64", "--num-problems", "20"]


@pytest.mark.example(minutes=10)
@pytest.mark.timeout(2400)
def test_the_demo_compares_its_arms(tmp_path: Path) -> None:
    target = re.search(r"^demo: setup\n\t\$\(PY\) (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert target is not None
    arguments = shlex.split(target[1].replace("runs/demo", str(tmp_path / "demo")))
    done = subprocess.run([sys.executable, *arguments, *SMALL], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "demo/report/results.json").read_text())
    assert len(report["points"]) == 2 * 4 + 1 and report["teacher"]["right"] > 0.9
    assert all(point["num_problems"] == 20 for point in report["points"])
    assert (tmp_path / "demo/report/accuracy.png").stat().st_size > 1000
