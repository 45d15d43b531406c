"""tools/check_env.py names what is here, and stops where something needed is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_tpt.environment import supported_versions

REPOSITORY = Path(__file__).parents[1]


def check_env(*arguments: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | ({"PYTHONPATH": str(first_on_path)} if first_on_path else {})
    command = [sys.executable, str(REPOSITORY / "tools" / "check_env.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def parts(result: subprocess.CompletedProcess[str]) -> dict[str, dict]:
    return {part["name"]: part for part in json.loads(result.stdout)}


def install(folder: Path, name: str, version: str) -> None:
    """Make `name` look installed in `folder`: the metadata that installers leave."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_environment_is_fit_and_described(tmp_path: Path) -> None:
    result = check_env("--json")
    assert result.returncode == 0, result.stderr
    found = parts(result)
    assert found["Python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]["found"] == torch.__version__.split("+")[0]
    assert found["Megatron Core"]["state"] == found["gloo"]["state"] == "active"
    assert ("CPU" in found["device"]["found"]) != torch.cuda.is_available()
    assert all(part["cost"] for part in found.values() if part["state"] == "missing")
    table = check_env("--record", str(tmp_path / "record.json")).stdout
    assert all(name in table for name in ("Transformer Engine", "apex", "vLLM", "datatrove", "NCCL"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["packages"]["torch"].split("+")[0] == found["torch"]["found"] and record["command"][-2] == "--record"
    assert record["python"] == found["Python"]["found"] and record["hardware"]["cores"] >= 1


def test_an_unsupported_version_of_a_required_part_is_exit_2(tmp_path: Path) -> None:
    install(tmp_path, "megatron-core", "0.12.0")
    result = check_env("--json", first_on_path=tmp_path)
    assert result.returncode == 2
    assert "Megatron Core unsupported (0.12.0, needs" in result.stderr and "make setup" in result.stderr
    assert parts(result)["Megatron Core"]["state"] == "unsupported"


def test_parts_that_cannot_work_are_not_taken_for_working(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    install(tmp_path, "apex", "0.9.10")
    install(tmp_path, "transformer-engine", "2.9.0")
    result = check_env("--json", first_on_path=tmp_path)
    assert result.returncode == 0, result.stderr
    found = parts(result)
    assert found["apex"]["state"] == "broken" and "of that name" in found["apex"]["found"]
    # Metadata alone: nothing to import on a GPU, no GPU to use it elsewhere.
    expected = "broken" if torch.cuda.is_available() else "idle"
    assert found["Transformer Engine"]["state"] == expected


def test_the_supported_versions_are_those_of_the_package() -> None:
    ranges = supported_versions()
    assert ranges["python"].contains("3.12.1") and not ranges["python"].contains("3.11.9")
    assert ranges["megatron-core"].contains("0.19.2") and not ranges["megatron-core"].contains("0.20.0")
    assert "pytest" not in ranges
