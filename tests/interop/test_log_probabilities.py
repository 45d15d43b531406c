"""The trainer's model and all engines find the same log-probabilities."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import hf_logits, some_tokens

HERE = Path(__file__).parent
Folders = Callable[[str], Path]


@pytest.mark.parametrize(
    "name, engines",
    [
        ("llama3-scaled-tied", ["transformers", "vllm"]),
        pytest.param("qwen2", ["transformers", "vllm", "vllm-server"], marks=pytest.mark.slow),
    ],
)
def test_trainer_and_engines_agree_on_the_log_probabilities_of_prompts(
    name: str, engines: list[str], hf_folder: Folders, imported: Folders
) -> None:
    tokens = some_tokens(num_rows=6, length=200)
    command = [sys.executable, HERE / "likelihood_worker.py", imported(name), hf_folder(name), *engines]
    result = subprocess.run(
        command,
        input=json.dumps(tokens.tolist()),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},  # with one, vLLM on a CPU has half its speed
        timeout=550,
    )
    assert result.returncode == 0, result.stderr
    found = {who: torch.tensor(rows) for who, rows in json.loads(result.stdout.splitlines()[-1]).items()}
    assert set(found) == {"trainer", *engines}
    expected = hf_logits(hf_folder(name), tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    for who, values in found.items():
        difference = (values - expected).abs().max().item()
        print(f"{name}: {who}: largest difference {difference:.2e}")
        assert difference < 1e-4, who
