"""docs/tutorial.md as a reader types it: every command, in order, ends in a chat model that answers its questions."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# No network here: the demo's teacher thinks in place of the model from the Hub. It knows no English, and the filters
# would rightly reject what it writes.
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOISE = (
    f"{REPOSITORY}/examples/demo/teacher --filters.min-words 0 --filters.max-repeated-share 1 --filters.loop-words 0 "
    f"--filters.max-foreign-share 1 --max-document-tokens 400"
)


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/tutorial.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.example(minutes=2)
def test_every_command_of_the_tutorial_works_as_typed(tmp_path: Path) -> None:
    for name in ("tools", "examples", "megatron_tpt"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    path = f"{REPOSITORY / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    commands = _commands()
    assert commands[:2] == ["make setup", "source .venv/bin/activate"]
    assert sum(MODEL in command for command in commands) == 1
    for command in commands[2:]:
        done = subprocess.run(
            command.replace(MODEL, NOISE), shell=True, cwd=tmp_path, env=os.environ | {"PATH": path},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (result,) = json.loads((tmp_path / "runs/tutorial/results/results.json").read_text())["models"]
    assert result["accuracy"] == 1.0
    assert result["truncated_fraction"] == 0.0
