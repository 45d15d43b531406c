"""tools/evaluate.py --run: the checkpoints of a real training run, while it trains and afterwards."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import CORPUS, make_tokenizer, unchanged_environment

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.tools._checkpoint_evaluation import evaluate_checkpoints

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of six steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("run")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(100) for text in CORPUS))
    make_tokenizer(folder / "tokenizer")
    index(IndexOptions(input=[texts], tokenizer=folder / "tokenizer", output=folder / "index"))
    sections: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run")},
        "data": {"train": [str(folder / "index")]},
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2},
        "training": {"num_steps": 6, "sequence_length": 64, "global_batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "checkpoint": {"save_interval": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the evaluation of `run`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "evaluation"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_checkpoints_are_evaluated_beside_training_into_its_tensorboard(recipe: Path, tmp_path: Path) -> None:
    run = recipe.parent / "run"
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(json.dumps({"prompt": text, "answer": str(i)}) + "\n" for i, text in enumerate(CORPUS)))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    runs = EvaluateOptions(
        run=run, data=problems, documents=texts, output=tmp_path / "out", max_new_tokens=4, engine="transformers",
        follow=True,
    ).with_documents()  # fmt: skip
    with pytest.raises(UserError, match=r"not the folder of a training run \(no run.yaml\)"):
        evaluate_checkpoints(runs)
    command = [sys.executable, "-m", "megatron_tpt.pretrain", str(recipe)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as training:
        while not (run / "run.yaml").is_file():
            assert training.poll() is None
            time.sleep(0.1)
        evaluate_checkpoints(runs)  # ends with the checkpoint of the last step
        assert training.wait() == 0
    steps = [2, 4, 6]
    written = {step: json.loads((tmp_path / f"out/step_{step:08d}/results.json").read_text()) for step in steps}
    assert all(result["models"][0]["num_problems"] == 3 for result in written.values())
    lengths = [(step, written[step]["models"][0]["mean_output_tokens"]) for step in steps]
    assert scalars(run)["sums/mean_output_tokens"] == lengths  # whole numbers
    assert [step for step, _ in scalars(run)["sums/accuracy"]] == steps
    assert scalars(run)["documents/perplexity"] == [
        (step, pytest.approx(written[step]["documents"][0]["perplexity"])) for step in steps
    ]
    assert not list((tmp_path / "out/models").iterdir())

    # The same command asks nothing again but what is missing, and shows no step twice.
    before = (tmp_path / "out/step_00000004/results.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out/step_00000006")
    evaluate_checkpoints(runs)
    assert [step for step, _ in scalars(run)["sums/accuracy"]] == steps
    assert (tmp_path / "out/step_00000004/results.json").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "out/step_00000006/results.json").read_text())
    assert again["models"] == written[6]["models"]


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": "x.jsonl", "output": tmp_path}
    with pytest.raises(UserError, match="either --model or --run"):
        EvaluateOptions(**common)
    with pytest.raises(UserError, match="either --model or --run"):
        EvaluateOptions(**common, model=["m"], run=tmp_path)
    with pytest.raises(UserError, match="omit --rescore"):
        EvaluateOptions(**common, run=tmp_path, rescore=True)
    with pytest.raises(UserError, match="--follow waits"):
        EvaluateOptions(**common, model=["m"], follow=True)
