"""slurm/pipeline.sh on a real SLURM of two nodes: from documents to a scored model, with two ranks on each node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import slurm_cluster
from tiny_models import make_model
from toy_runs import wait_until

REPOSITORY = Path(__file__).parents[2]
SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
PATIENCE_S = 1800
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STAGES = ["pack", "augment", "index", "pretrain", "finetune", "export", "evaluate"]
TRAINING = {"num_steps": 6, "dtype": "float32", "sequence_length": 64, "global_batch_size": 4}


def write_inputs(folder: Path) -> Path:
    """A teacher, documents, chats, questions, recipes, and the pipeline's variables."""
    teacher = make_model(folder / "teacher", context=1024, chat_template=CHAT_TEMPLATE)
    rows = {
        "documents": [{"id": str(i), "text": f"Ferry {i} leaves at {i} and has {2 * i} seats."} for i in range(4)],
        "chats": [
            {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
            for i in range(16)
        ],
        "questions": [{"id": str(i), "prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    common = {
        "training": TRAINING,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "logging": {"tensorboard": False},
    }
    model = SHAPE | {"max_position_embeddings": 512}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(common | {"model": model}))
    (folder / "finetune.yaml").write_text(yaml.safe_dump(common | {"training": TRAINING | {"num_steps": "six"}}))
    variables = f"""
OUTPUT={folder}/out
DOCUMENTS={folder}/documents.jsonl
TEACHER={teacher}
AUGMENT=(--executor slurm --num-tasks 2 --rows-per-shard 2 --engine transformers --temperature 1 --max-new-tokens 40
    --max-document-tokens 50 --filters.min-words 0 --filters.max-repeated-share 1 --filters.loop-words 0
    --filters.max-foreign-share 1 --filters.max-refusal-words 0 --filters.max-copied-share 1)
TOKENIZER={teacher}
PRETRAIN=({folder}/pretrain.yaml)
CHATS={folder}/chats.jsonl
PACK=(--sequence-length 64)
FINETUNE=({folder}/finetune.yaml)
EVALUATE=(--data {folder}/questions.jsonl --chat --answer-type number --max-new-tokens 8 --engine transformers)
"""
    (folder / "pipeline.env").write_text(variables)
    return folder / "pipeline.env"


def run_pipeline(variables: Path) -> str:
    environment = os.environ | {"PYTHON": sys.executable, "NODES": "2", "TASKS_PER_NODE": "2"}
    environment |= {"GPUS_PER_NODE": "0", "CPUS_PER_TASK": "1", "BAD_NODES": str(variables.parent / "bad-nodes.txt")}
    command = [str(REPOSITORY / "slurm/pipeline.sh"), str(variables)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def done_stages(out: Path) -> list[str]:
    return sorted((path.name for path in (out / "done").iterdir()), key=STAGES.index)


def logs(out: Path) -> str:
    return "".join(path.read_text() for path in (out / "logs").glob("*.out"))


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def test_reinforcement_learning_is_a_stage_where_it_is_asked_for(tmp_path: Path) -> None:
    """What is submitted: its model is the one that is exported, and without it the fine-tuned one."""
    with slurm_cluster(num_cpus=2, num_nodes=2):
        subprocess.run(["scontrol", "update", "PartitionName=main", "State=DOWN"], check=True)  # so that nothing begins
        variables = write_inputs(tmp_path)
        commands = run_and_read(variables)
        assert list(commands) == STAGES
        assert f"--checkpoint {tmp_path}/out/finetune/checkpoints/latest" in commands["export"]
        variables.write_text(f"{variables.read_text()}OUTPUT={tmp_path}/other\nRL=(rl.yaml --training.num_steps=2)\n")
        commands = run_and_read(variables)
        assert list(commands) == [*STAGES[:5], "rl", "export-rl", "evaluate-rl"]
        out = tmp_path / "other"
        assert commands["rl"].endswith(
            f"slurm/train.sbatch rl rl.yaml --training.num_steps=2 --run.output_dir={out}/rl "
            f"--training.init_from={out}/finetune/checkpoints/latest"
        )
        assert f"--checkpoint {out}/rl/checkpoints/latest --output {out}/model-rl" in commands["export-rl"]
        assert f"--model {out}/model-rl --output {out}/evaluation-rl" in commands["evaluate-rl"]
        for stage in STAGES:
            (out / "done" / stage).touch()
        assert list(run_and_read(variables)) == ["rl", "export-rl", "evaluate-rl"], "added to a pipeline that is done"


def run_and_read(variables: Path) -> dict[str, str]:
    """The commands of the jobs that the pipeline submits, by their names, in order; they are removed."""
    run_pipeline(variables)
    listed = subprocess.run(
        ["squeue", "--noheader", "--sort=i", "--Format=Name:20,Command:2000"],
        capture_output=True,
        text=True,
        check=True,
    )
    subprocess.run(["scancel", "--partition=main"], check=True)
    wait_until(lambda: not queue())
    return {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in listed.stdout.splitlines()}


@pytest.mark.slow(minutes=4)
@pytest.mark.timeout(2 * PATIENCE_S)
def test_documents_become_a_scored_model_also_after_a_failure(tmp_path: Path) -> None:
    with slurm_cluster(num_cpus=2, num_nodes=2):
        variables = write_inputs(tmp_path)
        out, recipe = tmp_path / "out", tmp_path / "finetune.yaml"
        assert "evaluate: job" in run_pipeline(variables)
        again = run_pipeline(variables)
        assert again.count("is in the queue") + again.count("done before") == len(STAGES), again
        wait_until(lambda: not queue(), timeout_s=PATIENCE_S)
        assert done_stages(out) == STAGES[:4], logs(out)
        assert "2 nodes, 4 processes" in logs(out) and "training.num_steps: 'six' is not" in logs(out)

        recipe.write_text(recipe.read_text().replace("six", "6"))
        shown = run_pipeline(variables)
        assert "pretrain: done before" in shown and "finetune: job" in shown
        wait_until(lambda: not queue(), timeout_s=PATIENCE_S)
        assert done_stages(out) == STAGES, logs(out)
        for name in ("pretrain", "finetune"):
            ranks = [path.name for path in (out / "logs").glob(f"{name}-*/rank-*")]
            assert sorted(set(ranks)) == [f"rank-0000{rank}-node{1 + rank // 2}.txt" for rank in range(4)]
        assert list((out / "logs").glob("evaluate-*/start-0/environment-node*.json"))
        [result] = json.loads((out / "evaluation/results.json").read_text())["models"]
        assert result["num_problems"] == 4 and 0 <= result["accuracy"] <= 1
