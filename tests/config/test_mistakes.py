"""Mistakes in recipes and on the command line: every one is reported at once, with its file, its line and a
suggestion."""

from pathlib import Path

import pytest

from megatron_tpt.config.cli import parse
from megatron_tpt.config.effects import without_effect
from megatron_tpt.config.load import load_recipe, read_yaml, recipe_from_dict
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.interop.options import ImportOptions
from megatron_tpt.recipes import finetune
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe


def load(tmp_path: Path, text: str, *arguments: str, cls: type[Recipe] = PretrainRecipe) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(cls, [str(path), *arguments])[0]


def refusal(tmp_path: Path, text: str, *arguments: str, cls: type[Recipe] = PretrainRecipe) -> list[str]:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *arguments, cls=cls)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_every_mistake_of_a_file_is_reported_with_its_line(tmp_path: Path) -> None:
    text = """
model:
  num_layers: 2
training:
  sequence_lenght: 64
  num_steps: many
  dtype: [bf16]
optimiser: {learning_rate: 1e-3}
data:
  train:
    - a
    - path: b
      wieght: 2
  num_workers:
"""
    assert refusal(tmp_path, text) == [
        "recipe.yaml:5: training.sequence_lenght: unknown; did you mean sequence_length?",
        "recipe.yaml:6: training.num_steps: 'many' is not a whole number",
        "recipe.yaml:7: training.dtype: ['bf16'] is not one of float32, bfloat16",
        "recipe.yaml:8: optimiser: unknown; did you mean optimizer?",
        "recipe.yaml:13: data.train[1].wieght: unknown; did you mean weight?",
        "recipe.yaml:14: data.num_workers: has no value: give a whole number, or remove it",
    ]


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("num_steps: 5", "recipe.yaml:1: num_steps: unknown; did you mean training.num_steps or profiling.num_steps?"),
        ("model: {sequence_length: 5}", "model.sequence_length: unknown; did you mean training.sequence_length?"),
        ("training: {num-steps: 5}", "training.num-steps: unknown; did you mean num_steps?"),
        ("training: {num_epochs: 5}", "training.num_epochs: unknown; it is a setting of fine-tuning"),
        ("training: 5", "recipe.yaml:1: training: 5 is not a mapping with num_steps"),
        ("training: {num_steps: 2.5}", "training.num_steps: 2.5 is not a whole number"),
        ("training: {num_steps: true}", "training.num_steps: True is not a whole number"),
        ("\ntraining: {num_steps: 0}", "recipe.yaml:2: training.num_steps=0 must be 1 or more"),
        ("training: {validation_steps: some}", "'some' is not a whole number or all"),
        ("optimizer: {clip_grad: .nan}", "optimizer.clip_grad: nan is not a number"),
        ("parallel: {sequence_parallel: 1}", "parallel.sequence_parallel: 1 is not true or false"),
        ("run: {output_dir: [a]}", "run.output_dir: ['a'] is not a path"),
        ("logging: {wandb_project: on}", "True is not a text: write it in quotes"),
        ("data: {train: [{weight: 1}]}", "recipe.yaml:1: data.train[0]: lacks path: give a path"),
        ("data: {train: 7}", "data.train: 7 is not a list"),
        ("profiling: {ranks: [a, 1]}", "recipe.yaml:1: profiling.ranks[0]: 'a' is not a whole number"),
        ("a: 1\na: 2", "recipe.yaml:2: a is there twice (line 1 has the first)"),
        ("training: {num_steps: 1,\n num_steps: 1}", "recipe.yaml:2: training.num_steps is there twice"),
        ("data:\n train:\n - {path: a,\n path: b}", "recipe.yaml:4: data.train[0].path is there twice"),
        ("model: {preset: [a]}", "model.preset=['a'] is not known"),
        ("a: [", "recipe.yaml:1 is not YAML: while parsing a flow node, expected the node content"),
        ("a: [1,\n b: 2}", "recipe.yaml:2 is not YAML: while parsing a flow sequence, expected ','"),
        ("a: &x [*x]", "recipe.yaml:1: more than 100 levels, aliases included"),
        ("run: {output_dir: ~nobody_of_this_name/x}", "there is no such home folder"),
        ("schöner: 1", "schöner: unknown; known there: run, model"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_where_it_is(tmp_path: Path, text: str, reported: str) -> None:
    lines = refusal(tmp_path, text)
    assert len(lines) == 1 and reported in lines[0]


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--training.num_stepz=7"], "command line: training.num_stepz: unknown; did you mean num_steps?"),
        (
            ["--num_steps=7"],
            "command line: num_steps: unknown; did you mean training.num_steps or profiling.num_steps?",
        ),
        (["--devise=h100"], "command line: devise: unknown; did you mean --device?"),
        (["--data.prompt_column=q"], "data.prompt_column: unknown; it is a setting of fine-tuning"),
        (["--training.num_steps=x"], "command line: training.num_steps: 'x' is not a whole number"),
        (["--training.num_steps="], "command line: training.num_steps: has no value"),
        (["--training.num_steps", "--dry-run"], "--training.num_steps lacks its value"),
        (["-x"], "-x: unknown; options begin with two dashes"),
        (["--dry-run", "8"], "expected one recipe file, got 2"),
        (["--dry-run=0"], "--dry-run=0: the number of processes"),
        (["--device=h100"], "--device and --mfu say what --dry-run assumes"),
        (["--dry-run", "--mfu=40"], "--mfu=40: must be a share of the peak"),
        (["--training.num_steps.x=1"], "training.num_steps is not a section"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(tmp_path: Path, arguments: list[str], reported: str) -> None:
    lines = refusal(tmp_path, "training: {num_steps: 5}", *arguments)
    assert len(lines) == 1 and reported in lines[0]


def test_mistakes_of_the_file_and_of_the_command_line_are_reported_together(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "model: {num_layer: 2}", "--training.seed=1", "--optimizer.lr=1")
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:1", "model.num_layer"],
        ["command line", "training.seed"],
        ["command line", "optimizer.lr"],
    ]
    assert lines[1].endswith("did you mean run.seed?")


def test_values_are_taken_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = """
training:
run:
  output_dir: ~/runs/a
data: {train: ~/data/x, validation: [{path: ~/data/y, weight: 2}]}
faults: {rerun: off}
"""
    recipe = load(tmp_path, text, "--training.num_steps=1e3", "--data.cache_dir=~/c", "--optimizer.learning_rate=1e-3")
    assert isinstance(recipe, PretrainRecipe)
    paths = (recipe.run.output_dir, recipe.data.train[0].path, recipe.data.validation[0].path, recipe.data.cache_dir)
    assert [str(path) for path in paths] == [f"/home/someone/{rest}" for rest in ("runs/a", "data/x", "data/y", "c")]
    assert (recipe.training.num_steps, recipe.optimizer.learning_rate, recipe.faults.rerun) == (1000, 1e-3, "off")


def test_a_mapping_on_the_command_line_leaves_the_rest_of_its_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--training={num_steps: 9, dtype: float32}", "--run.seed=1", "--run.seed=2"]
    recipe = load(tmp_path, "training: {sequence_length: 64, num_steps: 5}", *options)
    training = recipe.training
    assert (training.sequence_length, training.num_steps, training.dtype, recipe.run.seed) == (64, 9, "float32", 2)
    assert capsys.readouterr().err == "warning: --run.seed is given twice: 2 counts, and 1 does not\n"


def test_an_empty_or_broken_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content, reported in ((b"", "must be a mapping"), (b"\xff\xfe", "is not UTF-8"), (b"[1]", "must be a mapping")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reported):
            read_yaml(path)
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)


def test_equal_keys_are_refused_in_lists_of_sources_and_in_options_of_tools(tmp_path: Path) -> None:
    sources = tmp_path / "sources.yaml"
    sources.write_text("- {path: a}\n- path: b\n  weight: 1\n  weight: 2\n")
    assert refusal(tmp_path, f"data: {{train: {sources}}}") == [
        "sources.yaml:4: [1].weight is there twice (line 3 has the first): put all of it into one"
    ]
    sources.write_text("- {path: a, wieght: 1}\n- path: b\n  weight: many\n- {path: c, weight: 0}\n")
    assert refusal(tmp_path, f"data: {{train: {sources}}}") == [
        "sources.yaml:1: [0].wieght: unknown; known there: path, weight, name, max_epochs",
        "sources.yaml:3: [1].weight: 'many' is not a number",
        "sources.yaml:4: data: weight 0.0 of c must be above 0",
    ]
    sources.write_text(f"- a\n- {sources}\n")
    (line,) = refusal(tmp_path, f"data: {{train: [{{path: {sources}, weight: '2'}}]}}")
    assert "is a list of sources that has itself among them" in line
    options = tmp_path / "options.yaml"
    options.write_text("model: a\nmodel: b\n")
    with pytest.raises(UserError, match=r"options\.yaml:2: model is there twice \(line 1"):
        parse(ImportOptions, ["--recipe", str(options), "--output", "x"])


MODEL = {"vocab_size": 1000}


@pytest.mark.parametrize(
    ("cls", "training", "data", "reported"),
    [
        (FinetuneRecipe, {"validation_interval": 2}, {"train": "a"}, "has nothing to validate with"),
        (FinetuneRecipe, {}, {"train": "a", "validation": "b"}, "data.validation (b) is never read"),
        (PretrainRecipe, {"validation_interval": 2}, {"train": "a"}, "has nothing to validate with"),
        (PretrainRecipe, {}, {"train": "a", "validation": ["b", "c"]}, "data.validation (b) is never read"),
        (PretrainRecipe, {"validation_interval": 2}, {"mock": True}, "data.mock has nothing to validate with"),
        (PretrainRecipe, {"validation_interval": -1}, {"train": "a"}, "validation_interval=-1 must be 0 or more"),
        (PretrainRecipe, {"validation_steps": 0}, {"train": "a"}, "validation_steps=0 must be 1 or more, or all"),
    ],
)
def test_validation_without_data_and_data_without_validation_are_refused(
    cls: type[Recipe], training: dict, data: dict, reported: str
) -> None:
    with pytest.raises(UserError) as error:
        recipe_from_dict(cls, {"model": MODEL, "training": training, "data": data}).check(1)
    assert reported in str(error.value)


@pytest.mark.parametrize(
    ("raw", "reported"),
    [
        (
            {"optimizer": {"muon_scale_factor": 1.0}},
            "optimizer.muon_scale_factor=1.0 has no effect: it needs optimizer.n",
        ),
        ({"optimizer": {"schedule": "constant", "min_learning_rate": 1e-5}}, "min_learning_rate=1e-05 has no effect"),
        ({"training": {"recompute_layers": 3, "recompute": "full"}}, "needs training.recompute=block"),
        ({"training": {"validation_steps": 3}}, "training.validation_steps=3 has no effect"),
        ({"checkpoint": {"keep_every": 5}}, "checkpoint.keep_every=5 has no effect: it needs checkpoint.keep_last"),
        ({"faults": {"max_rollbacks": 5}}, "faults.max_rollbacks=5 has no effect"),
        ({"profiling": {"ranks": [1]}}, "profiling.ranks=[1] has no effect: it needs profiling.first_step"),
        ({"profiling": {"first_step": 101}}, "profiling.first_step=101 has no effect: the run ends after"),
        ({"training": {"skip_steps": ["200-210"]}}, "training.skip_steps: 200-210 has no effect"),
        (
            {"training": {"batch_size_ramp": [{"num_steps": 100, "global_batch_size": 4}]}},
            "training.global_batch_size=8 is never reached",
        ),
        (
            {"data": {"phases": [{"train": ["a"], "until_tokens": 1e9}, {"train": ["b"]}]}},
            "the phases from number 2 on are never reached",
        ),
        ({"data": {"mock": True, "loss_on": "thinking"}}, "data.loss_on=thinking has no effect"),
    ],
)
def test_what_has_no_effect_is_reported(raw: dict, reported: str) -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"model": MODEL, "data": {"train": "a"}, **raw})
    (line,) = without_effect(recipe)
    assert reported in line


def test_nothing_is_reported_of_settings_that_have_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {
        "optimizer": {"name": "muon", "muon_scale_factor": 1.0, "schedule": "wsd", "wsd_decay_steps": 5},
        "checkpoint": {"keep_last": 2, "keep_every": 5, "save_interval": 5, "asynchronous": True},
        "faults": {"on_loss_spike": "rollback", "max_rollbacks": 5, "loss_spike_factor": 3.0},
        "profiling": {"first_step": 100, "ranks": [1]},
        "data": {"train": "a", "loss_on": "thinking"},
    }
    assert list(without_effect(recipe_from_dict(PretrainRecipe, {"model": MODEL, **raw}))) == []
    pairs = {"data": {"train": ["a.jsonl"], "prompt_column": "q", "on_too_long": "skip"}, "model": MODEL}
    recipe = recipe_from_dict(FinetuneRecipe, pairs)
    assert list(without_effect(recipe)) == []
    monkeypatch.setattr(finetune, "is_all_packed", lambda data: True)
    assert [line.split("=")[0] for line in without_effect(recipe)] == [
        "data.prompt_column",
        "data.on_too_long",
    ]
