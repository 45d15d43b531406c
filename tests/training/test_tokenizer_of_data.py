"""The tokenizer of a run's data is there and the right one before the run starts, and its checkpoints keep it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from training_runs import Train

from megatron_tpt import platform
from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.manifest import Manifest, ThinkTokens
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.callbacks import SaveCheckpoints
from megatron_tpt.training.checkpoint_saving import SaveError, _together
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.trainer import Callback, StepReport, Trainer


@pytest.fixture
def moved(recipe: dict, index_prefix: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    """A recipe whose index was made elsewhere; its tokenizer was brought along to `tokenizer`."""
    for kind in ("bin", "idx"):
        shutil.copyfile(f"{index_prefix}.{kind}", tmp_path / f"data.{kind}")
    manifest = Manifest.read(index_prefix)
    elsewhere = dataclasses.replace(manifest.tokenizer, path=str(tmp_path / "elsewhere"))
    dataclasses.replace(manifest, tokenizer=elsewhere).write(tmp_path / "data")
    shutil.copytree(tokenizer_path, tmp_path / "tokenizer")
    path = tmp_path / "recipe.yaml"
    content = {**recipe, "data": {"train": str(tmp_path / "data")}, "run": {"output_dir": str(tmp_path / "run")}}
    path.write_text(yaml.safe_dump(content))
    return path


def prepared(path: Path, *overrides: str) -> PretrainRecipe | None:
    return prepare(*load_recipe(PretrainRecipe, [str(path), *overrides]))


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_tokenizer_that_is_not_there_or_another_is_refused_before_training(
    dry_run: list[str], moved: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"elsewhere: the tokenizer of the data is not there.*data\.tokenizer"):
        prepared(moved, *dry_run)
    folder = tmp_path / "tokenizer"
    brought = [f"--data.tokenizer={folder}", *dry_run]
    prepared(moved, *brought)
    settings = folder / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"eos_token": "<|pad|>"}))
    with pytest.raises(UserError, match="its end-of-sequence token differs"):
        prepared(moved, *brought)
    settings.write_text(before)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"its tokenizer\.json differs"):
        prepared(moved, *brought)


class _RemoveTokenizer(Callback):
    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        shutil.rmtree(trainer.data.tokenizer_path, ignore_errors=True)


def test_checkpoints_keep_the_tokenizer_although_its_folder_goes_away(moved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    recipe = prepared(moved, f"--data.tokenizer={folder}", "--training.num_steps=3")
    assert recipe is not None
    with distributed(recipe, before=prepare_cache):
        build_trainer(recipe, build_pretrain_data(recipe), [_RemoveTokenizer(), SaveCheckpoints()]).fit()
    assert not folder.exists()
    kept = tmp_path / "run/checkpoints/latest/tokenizer"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == expected


@pytest.mark.parametrize("error", [UserError("fix it"), OSError("fix it")])
def test_all_ranks_hear_of_a_checkpoint_that_one_cannot_write(error: Exception, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with platform.process_groups(ParallelConfig()):
        assert _together(tmp_path, lambda: 3) == 3
        with pytest.raises(SaveError, match=r"could not be written \(rank 0: fix it\)"):
            _together(tmp_path, fail)


def _renamed(tokenizer: Path, target: Path, first: str, second: str) -> Path:
    """The tokenizer with the ids of two tokens exchanged: as many tokens, others."""
    shutil.copytree(tokenizer, target)
    content = json.loads((target / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


@pytest.fixture
def others_index(records_path: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    """The same documents, indexed with a tokenizer of the same size."""
    index(
        IndexOptions(
            input=[records_path],
            tokenizer=_renamed(tokenizer_path, tmp_path / "other", "a", "b"),
            output=tmp_path / "others",
        )
    )
    return tmp_path / "others"


def test_weights_and_runs_of_another_tokenizer_are_refused(
    train: Train, others_index: Path, recipe: dict, tmp_path: Path
) -> None:
    save = {"checkpoint": {"save_interval": 2}, "training": recipe["training"] | {"num_steps": 3}}
    train("base", changes=save)
    checkpoint = tmp_path / "base/checkpoints/latest"
    path = tmp_path / "next.yaml"
    path.write_text(yaml.safe_dump(recipe))
    other = [f"--training.init_from={checkpoint}", f"--data.train={others_index}"]
    for dry_run in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="trained with another tokenizer"):
            prepared(path, *other, *dry_run)
    prepared(path, *other, "--training.allow_other_tokenizer=true")
    prepared(path, other[0])
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "ban", "response": "ke"}\n')
    path.write_text(yaml.safe_dump({"data": {"train": str(examples), "tokenizer": str(tmp_path / "other")}}))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        prepare(*load_recipe(FinetuneRecipe, [str(path), other[0]]))
    # The lengths of these documents are the same, so only the tokenizer shows that the data differs.
    with pytest.raises(AssertionError, match=r"UserError.*written by a run with another tokenizer"):
        train("base", f"--data.train={others_index}", changes=save)


def test_indices_that_do_not_go_together_or_hold_sentences_are_refused(
    recipe: dict, records_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    options = IndexOptions(input=[records_path], tokenizer=tokenizer_path, output=tmp_path / "base")
    index(options)
    instruct = tmp_path / "instruct"
    shutil.copytree(tokenizer_path, instruct)
    settings = json.loads((instruct / "tokenizer_config.json").read_text())
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|pad|>"}))
    index(dataclasses.replace(options, tokenizer=instruct, output=tmp_path / "instruct-data"))
    index(dataclasses.replace(options, sentences=True, output=tmp_path / "sentences"))
    think = dataclasses.replace(Manifest.read(tmp_path / "base"), think=ThinkTokens([2], [4]))
    for kind in ("bin", "idx"):
        shutil.copyfile(tmp_path / f"base.{kind}", tmp_path / f"tags.{kind}")
    think.write(tmp_path / "tags")
    path = tmp_path / "recipe.yaml"
    for name, words in (
        ("instruct-data", r"end-of-sequence token \(1\) is not that of the other data \(0\)"),
        ("tags", "its think tags"),
        ("sentences", "split into sentences"),
    ):
        path.write_text(yaml.safe_dump(recipe | {"data": {"train": [str(tmp_path / "base"), str(tmp_path / name)]}}))
        for dry_run in ([], ["--dry-run"]):
            with pytest.raises(UserError, match=words):
                prepared(path, *dry_run)
