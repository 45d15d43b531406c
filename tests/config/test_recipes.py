"""Recipes: overrides, presets, and mistakes that are named before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_tpt.config.load import load_recipe, read_yaml, recipe_from_dict, to_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe

MINIMAL = {"data": {"train": "prefix"}, "model": {"vocab_size": 1000}}


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def load(path: Path, *arguments: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, [str(path), *arguments])[0]


def test_dotted_overrides_win_over_the_file(recipe_path: Path) -> None:
    recipe = load(recipe_path, "--training.num_steps=7", "--model.hidden_size", "128", "--optimizer.learning_rate=1e-3")
    assert (recipe.training.num_steps, recipe.model.hidden_size, recipe.optimizer.learning_rate) == (7, 128, 1e-3)


def test_a_resolved_recipe_reads_back_as_itself(recipe_path: Path) -> None:
    recipe = load(recipe_path, "--model.preset=llama3.2-3b", "--data.validation=[{path: v, weight: 0.5}]")
    assert recipe_from_dict(PretrainRecipe, yaml.safe_load(to_yaml(recipe))) == recipe


def test_a_recipe_of_as_many_sources_as_a_blend_can_have_is_read_back(tmp_path: Path) -> None:
    """From a checkpoint, as on resume."""
    sources = [{"path": f"/data/thinking/part-{i:06}", "weight": 1.0 + i, "name": "all"} for i in range(32_766)]
    recipe = recipe_from_dict(PretrainRecipe, MINIMAL | {"data": {"train": sources}})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert recipe_from_dict(PretrainRecipe, read_yaml(tmp_path / "recipe.yaml")) == recipe


def test_preset_fills_in_what_is_not_given(recipe_path: Path) -> None:
    recipe = load(recipe_path, "--model.preset=llama3-8b", "--model.num_layers=4", "--model.vocab_size=128256")
    assert (recipe.model.num_layers, recipe.model.hidden_size, recipe.model.num_query_groups) == (4, 4096, 8)


@pytest.mark.parametrize(
    ("preset", "billions"),
    # Hugging Face counts 8.03, 3.21, 1.24, 1.54 and 7.62 billion; ours differ by the padding of the vocabulary only.
    [
        ("llama3-8b", 8.030),
        ("llama3.2-3b", 3.213),
        ("llama3.2-1b", 1.236),
        ("qwen2.5-math-1.5b", 1.544),
        ("qwen2.5-math-7b", 7.616),
    ],
)
def test_presets_have_the_published_number_of_parameters(recipe_path: Path, preset: str, billions: float) -> None:
    raw = {**MINIMAL, "model": {"preset": preset}}
    assert recipe_from_dict(PretrainRecipe, raw).model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.num_stepz=7"], "num_stepz"),
        (["--trainig.num_steps=7"], "trainig"),
        (["--training.num_steps=many"], "training.num_steps"),
        (["--training.num_steps=0"], "training.num_steps=0 must be 1 or more"),
        (["--training.dtype=fp16"], "training.dtype"),
        (["--model.preset=gpt5"], "model.preset=gpt5 is not known: use one of"),
        (["--model.num_attention_heads=3"], "not a multiple of model.num_attention_heads=3"),
        (["--model.num_query_groups=3"], "not a multiple of model.num_query_groups=3"),
        (["--parallel.sequence_parallel=true"], "needs parallel.tensor_parallel_size > 1"),
        (["--parallel.overlap_param_gather=true"], "needs parallel.distributed_optimizer"),
        (["--optimizer.min_learning_rate=1"], "optimizer.min_learning_rate=1"),
        (["--training.init_from=nowhere"], "training.init_from=nowhere is no checkpoint"),
        (["--training.num_steps"], "lacks its value"),
        (["--data.train=[{path: a, weight: 0}]"], "weight 0"),
    ],
)
def test_a_mistake_is_named_in_one_line(recipe_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        load(recipe_path, *arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "world_size", "words"),
    [
        (["--parallel.tensor_parallel_size=3"], 3, "model.num_attention_heads=4 is not a multiple of"),
        (["--parallel.tensor_parallel_size=2"], 1, "start a multiple of 2"),
        (["--parallel.pipeline_parallel_size=3"], 3, "model.num_layers=2 cannot be shared by"),
        (["--training.global_batch_size=6"], 4, "training.global_batch_size=6 is not a multiple of"),
        (["--optimizer.warmup_steps=100"], 1, "optimizer.warmup_steps=100 must be below"),
        (["--data.train=[]"], 1, "data.train is empty"),
    ],
)
def test_what_cannot_run_together_is_refused(
    recipe_path: Path, arguments: list[str], world_size: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load(recipe_path, *arguments).check(world_size)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="recipe"):
        load(path)


def start(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megatron_tpt.pretrain", *arguments], capture_output=True, text=True)


def test_the_program_ends_with_code_2_and_one_line(recipe_path: Path) -> None:
    for arguments, words in [
        ([str(recipe_path), "--model.num_layer=3"], "num_layer"),
        ([str(recipe_path), "--parallel.tensor_parallel_size=3"], "tensor_parallel_size=3"),
        ([str(recipe_path)], "prefix.json"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ]:
        result = start(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr
    assert list(recipe_path.parent.iterdir()) == [recipe_path], "something was written"


def test_dry_run_describes_an_8b_layout_and_starts_nothing(recipe_path: Path) -> None:
    shape = ["--model.preset=llama3-8b", "--model.vocab_size=128256", "--training.sequence_length=8192"]
    layout = ["--parallel.tensor_parallel_size=2", "--parallel.sequence_parallel=true"]
    result = start(str(recipe_path), *shape, *layout, "--training.global_batch_size=512", "--dry-run=64")
    assert result.returncode == 0, result.stderr
    for words in ("64 processes = tensor 2 x pipeline 1 x data 32", "8,030,261,248", "4,194,304", "GiB (weights 7.48"):
        assert words in result.stdout
    resolved = yaml.safe_load(result.stdout.split("\n\n")[0])
    assert recipe_from_dict(PretrainRecipe, resolved).model.hidden_size == 4096
    assert list(recipe_path.parent.iterdir()) == [recipe_path]


def test_finetuning_takes_the_shape_of_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump({"model": {"num_layers": 6, "rotary_base": 500.0}}))
    raw = {"training": {"init_from": str(checkpoint)}, "model": {"rotary_base": 8000.0}, "data": {"train": "x.jsonl"}}
    recipe = recipe_from_dict(FinetuneRecipe, raw)
    assert (recipe.model.num_layers, recipe.model.rotary_base) == (6, 8000.0)
    assert recipe.tokenizer_path == checkpoint / "tokenizer"


def test_help_has_every_field_and_an_example_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for cls, own in ((PretrainRecipe, "--data.phases"), (FinetuneRecipe, "--training.num_epochs")):
        with pytest.raises(SystemExit) as end:
            load_recipe(cls, ["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert end.value.code == 0 and any(line.startswith(f"  {own}  (") for line in lines)
        assert any(line.startswith("  --training.validation_steps  (int >= 1 | all; default: ") for line in lines)
        assert sum(line.startswith(("  python -m megatron_tpt.", "  torchrun ")) for line in lines) == 3
