"""The tokenizer of a run's data is there and the right one before the run starts, and its checkpoints keep it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_tpt import platform
from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.recipe import ParallelConfig, PretrainRecipe
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.training.callbacks import SaveCheckpoints
from megatron_tpt.training.checkpoint import SaveError, _together
from megatron_tpt.training.data import build_pretrain_data, prepare_cache
from megatron_tpt.training.launch import distributed, prepare
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
    with pytest.raises(UserError, match="its end-of-sequence token is another"):
        prepared(moved, *brought)
    settings.write_text(before)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"its tokenizer\.json is another"):
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
        Trainer(recipe, build_pretrain_data(recipe), [_RemoveTokenizer(), SaveCheckpoints()]).fit()
    assert not folder.exists()
    kept = tmp_path / "run/checkpoints/latest/tokenizer"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == expected


@pytest.mark.parametrize("error", [UserError("mend it"), OSError("mend it")])
def test_all_ranks_hear_of_a_checkpoint_that_one_cannot_write(error: Exception, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with platform.process_groups(ParallelConfig()):
        assert _together(tmp_path, lambda: 3) == 3
        with pytest.raises(SaveError, match=r"could not be written \(rank 0: mend it\)"):
            _together(tmp_path, fail)
