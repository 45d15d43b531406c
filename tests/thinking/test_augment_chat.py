"""The README's first example, word for word, against vLLM's own server."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from augment_runs import records, rejects
from tiny_models import CHAT_TEMPLATE, make_model
from vllm_servers import vllm_server

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_documents_are_thought_about_by_any_chat_server(tmp_path: Path) -> None:
    command = re.search(
        r"^python (tools/augment\.py --input examples/three(?:.|\n)*?--api chat)$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert command is not None
    model = make_model(tmp_path / "model", context=16384, chat_template=CHAT_TEMPLATE)
    with vllm_server(model) as url:
        words = command[1].replace("\\\n", " ").replace("NAME", model).replace("http://localhost:8000", url)
        words = words.replace("runs/three", str(tmp_path / "three"))
        result = subprocess.run([sys.executable, *shlex.split(words)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    given = [line for line in (ROOT / "examples" / "three_documents.jsonl").read_text().splitlines() if line]
    done, rejected = records(tmp_path / "three"), rejects(tmp_path / "three")
    assert len(done) + len(rejected) == len(given) == 3
    # What a model of random weights says may be refused as no thought; that it was asked is what counts.
    assert all(record.thinking for record in done)
    assert all(reject["thinking"] for reject in rejected)
