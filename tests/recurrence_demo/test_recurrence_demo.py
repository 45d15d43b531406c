"""`make recurrence-demo`, with fewer steps and problems, and all arms: every step is the same."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from arms import ALL_ARMS

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--num-steps", "32", "--num-problems", "10", "--arms", "all"]


@pytest.mark.example(minutes=10)
@pytest.mark.timeout(2400)
def test_the_miniature_compares_its_arms_at_every_depth(tmp_path: Path) -> None:
    target = re.search(r"^recurrence-demo: setup\n\t\$\(PY\) (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert target is not None
    arguments = shlex.split(target[1].replace("runs/recurrence-demo", str(tmp_path / "demo")))
    done = subprocess.run([sys.executable, *arguments, *SMALL], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    results = json.loads((tmp_path / "demo/report/results.json").read_text())
    assert [point["arm"] for point in results["points"]] == [
        arm.label(depth) for arm in ALL_ARMS for depth in arm.depths
    ]
    costs = {run["arm"]: run for run in results["runs"]}
    recurrent, static, as_many_flops = (costs[name] for name in ("recurrent", "static", "static, equal FLOPs"))
    assert recurrent["tokens"] == static["tokens"] == 32 * 32 * 60 and static["flops"] < recurrent["flops"]
    # Planned by the mean of the depths; those of so few steps differ from it.
    assert as_many_flops["flops"] == pytest.approx(recurrent["flops"], rel=0.25)
    assert "## Claims" in (tmp_path / "demo/report/report.md").read_text()
