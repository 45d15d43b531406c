"""The shell scripts of the repository: shellcheck finds nothing, and no site's own paths are in those for SLURM."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("slurm", "tools", "examples", "benchmarks", ".ci")
SCRIPTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and (path.suffix in (".sh", ".sbatch", ".env") or re.match(rb"#!.*\b(ba)?sh\n", path.read_bytes()[:40]))
)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (.ci/packages.sh)")
    assert {"pipeline.sh", "train.sbatch", "tool.sbatch", "cluster.env", "setup.sh"} <= {path.name for path in SCRIPTS}
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_job_scripts_name_no_site() -> None:
    for path in (ROOT / "slurm").iterdir():
        for line in path.read_text().splitlines():
            is_example = line.startswith("#") and not line.startswith(("#!", "#SBATCH"))
            assert is_example or not re.search(r"/(home|users|scratch|lustre|gpfs|shared|work|data)/", line), line
