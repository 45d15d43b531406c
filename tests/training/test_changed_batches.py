"""Another batch size, sequence length or text on resume: the run continues at the samples consumed, where it may."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from chat_templates import CHATML
from training_runs import FINETUNE, PRETRAIN, Train, Workers

from megatron_tpt import platform
from megatron_tpt.config.load import load_recipe, read_yaml, recipe_from_dict
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import BatchSizeStage, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.files import file_checksum
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.checkpoint_loading import read_trainer_state
from megatron_tpt.training.history import with_batches_of_run
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.resume import resume_warnings

ALLOW = "--data.allow_change=true"
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens")


def exact(metrics: list[dict]) -> list[list]:
    return [[row[name] for name in EXACT] for row in metrics]


def test_another_batch_size_continues_as_a_planned_ramp(train: Train, recipe: dict, tmp_path: Path) -> None:
    """Of steps 1-3 with 8 samples and 4-6 with 12; on the second start nothing changes any more."""
    training = {**recipe["training"], "num_steps": 6}
    changes = {"training": training, "checkpoint": {"save_interval": 3}}
    ramp = [{"num_steps": 3, "global_batch_size": 8}]
    plan = {**training, "batch_size_ramp": ramp, "global_batch_size": 12}
    planned = train("planned", changes=changes | {"training": plan})
    train("run", changes=changes)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    with pytest.raises(AssertionError, match=r"was written with training\.global_batch_size=8: .*allow_change=true"):
        train("run", "--training.global_batch_size=12", changes=changes)
    for _ in range(2):
        assert exact(train("run", "--training.global_batch_size=12", ALLOW, changes=changes)) == exact(planned)
    saved = read_yaml(tmp_path / "run/checkpoints/latest/recipe.yaml")["training"]
    assert saved["batch_size_ramp"] == [{"num_steps": 3, "global_batch_size": 8, "sequence_length": 32}]
    states = [read_trainer_state(tmp_path / "run/checkpoints" / f"step_0000000{step}") for step in (3, 6)]
    assert [(state["samples"], state["tokens"]) for state in states] == [(24, 768), (60, 1920)]


def test_another_data_parallel_size_with_its_batch_size(train: Train, recipe: dict, tmp_path: Path) -> None:
    """The batches of the steps done need not fit the processes of today: 2 samples over two, in twos, do not."""
    training = {**recipe["training"], "num_steps": 4, "global_batch_size": 2}
    changes = {"training": training, "checkpoint": {"save_interval": 2}}
    train("run", changes=changes)
    shutil.copytree(tmp_path / "run", tmp_path / "alone", symlinks=True)
    results = []
    for name, num_processes in (("alone", 1), ("run", 2)):
        shutil.rmtree(tmp_path / name / "checkpoints/step_00000004")
        metrics = train(name, "--training.global_batch_size=8", ALLOW, changes=changes, num_processes=num_processes)
        assert metrics[-1]["tokens"] == (2 * 2 + 2 * 8) * 32
        results.append([row["loss"] for row in metrics])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_another_sequence_length_continues_at_the_tokens_consumed(
    train: Train, recipe: dict, workers: Workers, tmp_path: Path
) -> None:
    changes = {"training": {**recipe["training"], "num_steps": 3}, "checkpoint": {"save_interval": 3}}
    train("run", changes=changes)
    options = [str(tmp_path / "run.yaml"), "--training.num_steps=5", "--training.sequence_length=24"]
    with pytest.raises(AssertionError, match=r"was written with training\.sequence_length=32: .*allow_change=true"):
        workers.run(PRETRAIN, options, 1)
    reported = workers.run(PRETRAIN, [*options, ALLOW], 1)
    assert "after step 3, 8 samples of 24 tokens a step, from sample 32 on" in reported
    assert "warning: samples of another training.sequence_length come in another order" in reported
    # 3 x 8 x 32 tokens are 32 samples of 24; then two steps of 8 x 24.
    state = read_trainer_state(tmp_path / "run/checkpoints/latest")
    assert (state["step"], state["samples"], state["tokens"]) == (5, 32 + 16, 768 + 2 * 192)
    resumed = recipe_from_dict(PretrainRecipe, read_yaml(tmp_path / "run/run.yaml"))
    prepare_cache(resumed)
    with platform.process_groups(ParallelConfig()):
        data = build_pretrain_data(resumed)
        first = next(iter(data.train.iterate(3, 4)))["tokens"]
        assert first[0].tolist() == data.train.dataset[32]["tokens"].tolist()
    assert workers.run(PRETRAIN, [*options, ALLOW], 1).count("other batches") == 0


def saved_run(folder: Path, step: int, training: dict) -> None:
    """What the history of a run is read from."""
    path = folder / f"checkpoints/step_{step:08d}/recipe.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({"training": training}))


def resumed(folder: Path, training: dict, cls: type = PretrainRecipe, **data: object) -> TrainingConfig:
    raw = {"run": {"output_dir": str(folder)}, "training": training, "data": {"allow_change": True, **data}}
    return with_batches_of_run(recipe_from_dict(cls, raw)).training


def test_the_history_of_several_changes_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramp = [{"num_steps": 4, "global_batch_size": 2}]
    saved_run(tmp_path, 10, {"sequence_length": 64, "global_batch_size": 8, "batch_size_ramp": ramp})
    plan = {"sequence_length": 64, "global_batch_size": 16, "batch_size_ramp": ramp}
    second = resumed(tmp_path, plan)
    assert second.batch_size_ramp == [BatchSizeStage(4, 2, 64), BatchSizeStage(6, 8, 64)]
    assert [second.num_samples(step) for step in (4, 10, 12)] == [8, 56, 88]
    assert second.batch_sizes == {16}

    saved_run(tmp_path, 12, dataclasses.asdict(second) | {"skip_steps": []})
    third = resumed(tmp_path, plan | {"sequence_length": 48})
    assert third.batch_size_ramp == [*second.batch_size_ramp, BatchSizeStage(2, 16, 64)]
    # 8, 48 and 32 samples of 64 tokens: 10.67, 64 and 42.67 of 48, each begun sample counted.
    assert third.num_samples(12) == 11 + 64 + 43
    assert resumed(tmp_path, plan) == dataclasses.replace(second)  # back at what is saved: nothing changes
    assert capsys.readouterr().out == ""
    resumed(tmp_path, plan | {"batch_size_ramp": [{"num_steps": 11, "global_batch_size": 4}]})
    reported = capsys.readouterr().out
    assert "no effect on the 11 steps that were done with other batch sizes (4 x 2, 6 x 8, 1 x 16)" in reported


def test_a_ramp_that_is_still_to_come_changes_too(tmp_path: Path) -> None:
    saved_run(tmp_path, 5, {"sequence_length": 64, "global_batch_size": 8})
    ramp = [{"num_steps": 3, "global_batch_size": 2}, {"num_steps": 6, "global_batch_size": 4}]
    training = resumed(tmp_path, {"sequence_length": 64, "global_batch_size": 8, "batch_size_ramp": ramp})
    assert training.batch_size_ramp == [BatchSizeStage(5, 8, 64), BatchSizeStage(4, 4)]
    assert [training.batch_size(step) for step in (0, 4, 5, 8, 9)] == [8, 8, 4, 4, 8]


def test_steps_done_are_not_for_a_new_run(tmp_path: Path) -> None:
    ramp = [{"num_steps": 3, "global_batch_size": 2, "sequence_length": 64}]
    with pytest.raises(UserError, match="is of steps that a run has done, and this one is new"):
        resumed(tmp_path, {"batch_size_ramp": ramp})


def test_a_checkpoint_of_before_the_change_is_not_taken_for_a_later_one(tmp_path: Path) -> None:
    """As when the newest turns out damaged, after the recipe was made for it."""
    saved_run(tmp_path, 3, {"sequence_length": 64, "global_batch_size": 8})
    saved_run(tmp_path, 6, {"sequence_length": 64, "global_batch_size": 8})
    raw = {"training": {"sequence_length": 64, "global_batch_size": 4}, "data": {"train": "p", "allow_change": True}}
    recipe = recipe_from_dict(PretrainRecipe, raw | {"run": {"output_dir": str(tmp_path)}})
    changed = with_batches_of_run(recipe)
    with pytest.raises(
        UserError, match=r"is of step 3, and training\.batch_size_ramp says that 6 steps are done: start"
    ):
        list(resume_warnings(changed, tmp_path / "checkpoints/step_00000003", {"step": 3, "data": {}}, None))


@pytest.fixture(scope="module")
def packed(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations packed into rows of 128 tokens."""
    folder = tmp_path_factory.mktemp("packed")
    source, template = folder / "chats.jsonl", folder / "chatml.jinja"
    template.write_text(CHATML)
    with source.open("w") as file:
        for i in range(60):
            said = {"user": f"sule {i} ?", "assistant": f"losh {'ban ' * (i % 5)}"}
            file.write(json.dumps({"messages": [{"role": k, "content": v} for k, v in said.items()]}) + "\n")
    options = PackOptions(
        input=[source],
        tokenizer=tokenizer_path,
        output=folder / "rows",
        sequence_length=128,
        chat_template=template,
    )
    pack_sft(options)
    return folder / "rows"


def test_fine_tuning_reads_the_epochs_that_are_left_with_another_batch_size(
    train: Train, recipe: dict, packed: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    num_rows = PackManifest.read(packed).counts.rows
    training = {**recipe["training"], "num_epochs": 2, "global_batch_size": 4, "sequence_length": 128}
    del training["num_steps"]
    model = {**recipe["model"], "vocab_size": 320}
    changes = {"training": training, "checkpoint": {"save_interval": 2}, "model": model}
    changes["data"] = {"train": [str(packed)], "tokenizer": str(tokenizer_path)}
    steps_before = -(-2 * num_rows // 4)
    assert len(train("run", changes=changes, program=FINETUNE)) == steps_before
    for folder in (tmp_path / "run/checkpoints").glob("step_*"):
        if folder.name != "step_00000002":
            shutil.rmtree(folder)
    option = "--training.global_batch_size=8"
    with pytest.raises(AssertionError, match=r"was written with training\.global_batch_size=4: .*allow_change=true"):
        train("run", option, changes=changes, program=FINETUNE)
    metrics = train("run", option, ALLOW, changes=changes, program=FINETUNE)
    num_left = -(-(2 * num_rows - 2 * 4) // 8)
    assert [row["step"] for row in metrics] == list(range(1, 2 + num_left + 1))
    assert metrics[-1]["tokens"] == (2 * 4 + num_left * 8) * 128


def test_packed_rows_are_counted_as_rows_at_another_length(packed: Path, tmp_path: Path) -> None:
    saved_run(tmp_path, 5, {"sequence_length": 32, "global_batch_size": 4})
    longer = {"sequence_length": 64, "global_batch_size": 4}
    assert resumed(tmp_path, longer, FinetuneRecipe, train=[str(packed)]).num_samples(5) == 20
    assert resumed(tmp_path, longer, FinetuneRecipe, train=["examples.jsonl"]).num_samples(5) == 10


def copy_index(prefix: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    for kind in ("bin", "idx", "json"):
        shutil.copy(f"{prefix}.{kind}", f"{target}.{kind}")
    return target


def test_other_text_of_the_same_lengths_is_other_data(
    train: Train, recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    changes = {"training": {**recipe["training"], "num_steps": 3}}
    changes["data"] = {"train": str(copy_index(index_prefix, tmp_path / "index/text"))}
    train("run", changes=changes)
    # The same tokens in the opposite order: every length is as before.
    path = tmp_path / "index/text.bin"
    tokens = path.read_bytes()
    path.write_bytes(b"".join(tokens[i : i + 2] for i in reversed(range(0, len(tokens), 2))))
    manifest = Manifest.read(tmp_path / "index/text")
    checksums = manifest.checksums | {"bin": file_checksum(path)}
    dataclasses.replace(manifest, checksums=checksums).write(tmp_path / "index/text")
    with pytest.raises(AssertionError, match=r"another text of data\.train: .*--data\.allow_change=true"):
        train("run", "--training.num_steps=4", changes=changes)
    assert len(train("run", "--training.num_steps=4", ALLOW, changes=changes)) == 4


def test_a_dry_run_says_where_another_batch_size_continues(
    train: Train, recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("run", "--training.num_steps=3")
    options = ["--training.num_steps=5", "--training.global_batch_size=16", ALLOW, "--dry-run"]
    capsys.readouterr()
    assert prepare(*load_recipe(PretrainRecipe, [str(tmp_path / "run.yaml"), *options])) is None
    reported = capsys.readouterr().out
    assert "after step 3, 16 samples of 32 tokens a step, from sample 24 on" in reported
    assert "2 of 5 steps are left" in reported
