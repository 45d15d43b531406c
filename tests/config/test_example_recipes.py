"""Every recipe in examples/ is read and described, at the sizes its comments speak of, and holds the paper's values."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_tpt.config.cli import parse
from megatron_tpt.config.layout import check_layout
from megatron_tpt.config.load import Arguments, load_recipe
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.strata import Strata
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.recipes.rl import RLRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"
REPRO_PAGE = (EXAMPLES / "repro/README.md").read_text()
TPT = sorted((EXAMPLES / "tpt").glob("*.yaml"))


def load(path: Path) -> Recipe:
    return load_recipe(FinetuneRecipe if path.name.startswith("sft_") else PretrainRecipe, [str(path)])[0]


@pytest.mark.parametrize("path", TPT, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_processes", [8, 32, 256])
def test_recipes_of_the_paper_are_described_on_clusters_of_several_sizes(
    path: Path, num_processes: int, capsys: pytest.CaptureFixture
) -> None:
    recipe = load(path)
    if recipe.training.global_batch_size % (num_processes // recipe.parallel.model_parallel_size):
        pytest.skip("more data-parallel ranks than samples in a batch")
    assert prepare(recipe, Arguments(path, [], dry_run=True, num_processes=num_processes, device="h100")) is None
    output = capsys.readouterr().out
    gib = float(output.split("memory per rank (estimate)")[1].split()[0])
    assert gib < 76 and "DOES NOT FIT" not in output, "more than an H100 has"


def test_the_recipe_of_one_gpu_has_125_million_parameters(capsys: pytest.CaptureFixture) -> None:
    path = EXAMPLES / "gpu_125m.yaml"
    recipe = load(path)
    assert recipe.model.num_parameters() == pytest.approx(125e6, rel=0.02)
    assert prepare(recipe, Arguments(path, [], dry_run=True)) is None
    assert "warning: the data is not here: data/corpus.json;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tokens_per_step", "steps", "rate", "schedule", "clip", "decay", "warmup", "beta2"),
    [
        ("pretrain_8b", 4.2e6, 25000, 3e-4, "constant", 1.0, 0.1, 100, 0.95),
        ("mid_1.5b", 8.4e6, 12500, 6e-5, "cosine", 0.3, 0.1, 100, 0.95),
        ("mid_3b", 8.4e6, 12500, 4e-5, "cosine", 0.3, 0.1, 100, 0.95),
        ("mid_7b", 8.4e6, 12500, 3e-5, "cosine", 0.3, 0.1, 100, 0.95),
        ("sft_1.5b", 1.05e6, 10000, 6e-5, "cosine", 0.2, 0.0, 400, 0.999),
        ("sft_3b", 1.05e6, 10000, 4e-5, "cosine", 0.2, 0.0, 400, 0.999),
        ("sft_7b", 1.05e6, 10000, 3e-5, "cosine", 0.2, 0.0, 400, 0.999),
    ],
)
def test_recipes_hold_the_values_of_table_5(
    name: str, tokens_per_step: float, steps: int, rate: float, schedule: str, clip: float, decay: float, warmup: int,
    beta2: float,
) -> None:  # fmt: skip
    recipe = load(EXAMPLES / "tpt" / f"{name}.yaml")
    training, optimizer = recipe.training, recipe.optimizer
    assert training.global_batch_size * training.sequence_length == pytest.approx(tokens_per_step, rel=0.01)
    found = (training.num_steps, optimizer.learning_rate, optimizer.schedule, optimizer.clip_grad)
    assert found == (steps, rate, schedule, clip)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (decay, warmup)
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, beta2)
    if name.startswith("sft_"):
        base = load(EXAMPLES / "tpt" / f"{name.replace('sft', 'mid')}.yaml").model.rotary_base
        assert (training.sequence_length, recipe.model.rotary_base) == (32768, 16 * base)


def test_the_arms_of_the_constrained_run_differ_in_data_alone() -> None:
    arms = [
        yaml.safe_load((EXAMPLES / f"tpt/constrained_10b_raw_40b_{arm}.yaml").read_text()) for arm in ("tpt", "vanilla")
    ]
    assert arms[0]["training"]["num_steps"] * 512 * 8192 == pytest.approx(40e9, rel=1e-3)
    for arm in arms:
        del arm["data"], arm["run"]["output_dir"]
    assert arms[0] == arms[1]


def test_commands_of_the_page_on_recipes_are_described(capsys: pytest.CaptureFixture) -> None:
    commands = [
        line.split() for line in (EXAMPLES / "README.md").read_text().splitlines() if line.startswith("python -m")
    ]
    assert {word for words in commands for word in words} >= {"--training.fp8=blockwise", "--optimizer.name=muon"}
    for words in commands:
        path, *overrides = words[3:]
        recipe, _ = load_recipe(PretrainRecipe, [str(EXAMPLES.parent / path), *overrides])
        assert recipe != load(EXAMPLES.parent / path)
        assert prepare(recipe, Arguments(Path(path), [], dry_run=True, num_processes=32, device="h100")) is None
        gib = float(capsys.readouterr().out.split("memory per rank (estimate)")[1].split()[0])
        assert gib < 76, "more than an H100 has"


def test_the_layouts_of_the_real_model_fit_its_heads() -> None:
    """SmolLM2-135M has nine heads, three of keys and values; its shape comes with the weights, not with the recipe."""
    script = (EXAMPLES / "smollm2/run.sh").read_text()
    [layouts] = re.findall(r"^for layout in (.+); do$", script, re.MULTILINE)
    [padding] = re.findall(r"--model\.vocab_padding_multiple=\d+", script)
    shape = {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9,
             "num_query_groups": 3, "vocab_size": 49152, "tie_embeddings": "true"}  # fmt: skip
    words = [str(EXAMPLES / "smollm2/midtrain.yaml"), "--data.train=[x]", padding]
    words += [f"--model.{name}={value}" for name, value in shape.items()]
    sizes = {}
    for layout in re.findall(r'"(\w+ \d+)"', layouts):
        kind, size = layout.split()
        sizes[kind] = int(size)
        recipe, _ = load_recipe(PretrainRecipe, [*words, f"--parallel.{kind}_parallel_size={size}"])
        check_layout(recipe, int(size))
    assert sizes.keys() == {"tensor", "pipeline"} and min(sizes.values()) > 1
    recipe, _ = load_recipe(PretrainRecipe, [*words, "--parallel.tensor_parallel_size=2"])
    with pytest.raises(UserError, match="num_attention_heads=9 is not a multiple"):
        check_layout(recipe, 2)


RECURRENCE = sorted(path for path in (EXAMPLES / "recurrence").glob("*.yaml") if not path.stem.startswith("smollm2"))


@pytest.mark.parametrize("path", RECURRENCE, ids=lambda path: path.stem)
def test_recipes_of_recurrence_hold_the_values_of_the_paper(path: Path, capsys: pytest.CaptureFixture) -> None:
    """arXiv 2511.07384: layers, depths, tokens and rates; and they fit on the GPUs that they name."""
    recipe = load(path)
    model, training, optimizer = recipe.model, recipe.training, recipe.optimizer
    layers = (model.prelude_layers, model.recurrent_layers, model.coda_layers)
    assert layers == ((4, 8, 4) if "tinyllama" in path.stem else (4, 6, 4)) and not model.tie_embeddings
    assert (model.mean_recurrences, model.backprop_recurrences) == (32, 8)
    steps, kind, share = (25_000, "linear", 0.25) if "heal" in path.stem else (50_000, "1-sqrt", 0.75)
    assert (training.num_steps, model.depth_curriculum, model.depth_curriculum_steps) == (steps, kind, share * steps)
    assert training.global_batch_size * training.sequence_length == 2**20 and training.sequence_length == 1024
    rates = (optimizer.learning_rate, optimizer.adam_learning_rate, optimizer.min_learning_rate)
    assert rates == (1e-3, 5e-5, 1e-6) and (optimizer.schedule, optimizer.wsd_decay_shape) == ("wsd", "cosine")
    rule = (optimizer.muon_coefficients, optimizer.muon_scale, optimizer.muon_scale_factor, optimizer.muon_momentum)
    assert rule == ("simple", "shape_scaling", 1.0, 0.95) and optimizer.muon_nesterov
    assert prepare(recipe, Arguments(path, [], dry_run=True, num_processes=32, device="h100")) is None
    assert "DOES NOT FIT" not in capsys.readouterr().out


REPRO = sorted((EXAMPLES / "repro").glob("*.yaml"))
ARMS = [
    options.replace("none", "").replace("`", "").split()
    for options in re.findall(r"^\| [^|]*(?:GRPO|REINFORCE\+\+|PPO)[^|]* \| ([^|]*) \|$", REPRO_PAGE, re.MULTILINE)
]


@pytest.mark.parametrize("path", REPRO, ids=lambda path: path.stem)
def test_arms_of_repro_hold_the_values_of_the_script_and_fit(path: Path, capsys: pytest.CaptureFixture) -> None:
    """256 prompts x 8 rollouts, one step for all of them; KL in the loss; clip 0.2/0.28; 500 steps of 1e-6."""
    names = set()
    assert len(ARMS) == 6
    for options in ARMS:
        recipe, _ = load_recipe(RLRecipe, [str(path), *options])
        names.add((recipe.algorithm.name, recipe.repro.enabled))
        assert (recipe.num_rollouts, recipe.steps_per_iteration, recipe.training.num_steps) == (2048, 1, 500)
        assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup_steps) == (1e-6, 20)
        algorithm = recipe.algorithm
        assert (algorithm.clip_low, algorithm.clip_high, algorithm.kl, algorithm.kl_coefficient) == (
            0.2, 0.28, "loss", 0.001
        )  # fmt: skip
        assert prepare(recipe, Arguments(path, [], dry_run=True, num_processes=16, device="h100")) is None
        gib = float(capsys.readouterr().out.split("memory per rank (estimate)")[1].split()[0])
        assert gib < 76, "more than an H100 has"
    assert names == {(name, on) for name in ("grpo", "reinforce_plus_plus", "ppo") for on in (False, True)}


def test_the_last_stage_of_front_loading_holds_the_values_of_the_paper(capsys: pytest.CaptureFixture) -> None:
    path = EXAMPLES / "front_loading/grpo.yaml"
    recipe, _ = load_recipe(RLRecipe, [str(path)])
    rollouts, algorithm, training = recipe.rollouts, recipe.algorithm, recipe.training
    assert (rollouts.num_prompts, rollouts.num_samples, rollouts.temperature) == (128, 8, 1.0)
    assert (algorithm.name, algorithm.kl_coefficient, recipe.optimizer.learning_rate) == ("grpo", 0.001, 1e-6)
    assert training.sequence_length == 8192 and recipe.steps_per_iteration == 1
    assert prepare(recipe, Arguments(path, [], dry_run=True, num_processes=32, device="h100")) is None
    gib = float(capsys.readouterr().out.split("memory per rank (estimate)")[1].split()[0])
    assert gib < 76, "more than an H100 has"


FRONT_LOADING = sorted((EXAMPLES / "front_loading").glob("*_8b*.yaml"))


@pytest.mark.parametrize("path", FRONT_LOADING, ids=lambda path: path.stem)
def test_recipes_of_front_loading_hold_the_values_of_the_paper(path: Path, capsys: pytest.CaptureFixture) -> None:
    """arXiv 2510.03264, section 3: batch, tokens, rates; and they fit on 512 H100."""
    recipe = load(path)
    training, optimizer = recipe.training, recipe.optimizer
    tokens_per_step = training.global_batch_size * training.sequence_length
    if path.stem.startswith("sft_"):
        assert (optimizer.learning_rate, optimizer.weight_decay, training.global_batch_size) == (5e-6, 0.01, 512)
        assert training.sequence_length == 32768 and recipe.data.num_examples == [4_800_000]
        assert optimizer.warmup_steps == pytest.approx(0.05 * training.num_steps)
    else:
        assert tokens_per_step == pytest.approx(6e6, rel=0.05)
        assert tokens_per_step * training.num_steps == pytest.approx(1e12, rel=1e-3)
        assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.weight_decay) == (3e-4, 3e-6, 0.1)
        assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.95)
        first, second = recipe.data.phases
        assert first.until_tokens == 600e9 and [source.shown_name for source in first.train] == ["base"]
        shares = {source.shown_name: source.weight for source in second.train}
        assert shares == ({"base": 100} if path.stem.endswith("base") else {"base": 80, "reasoning": 20})
    assert prepare(recipe, Arguments(path, [], dry_run=True, num_processes=512, device="h100")) is None
    assert "DOES NOT FIT" not in capsys.readouterr().out


def test_the_arms_of_front_loading_differ_in_data_alone_and_name_strata_that_exist() -> None:
    strata = Strata.read("front_loading").strata
    arms = [yaml.safe_load(path.read_text()) for path in FRONT_LOADING if path.stem.startswith("pretrain_")]
    named = [Path(source["path"]).name for arm in arms for source in arm["data"]["phases"][1]["train"]]
    assert len(arms) == 5 and {*named} - {"base"} == {"shq", "ldq", "lmq", "ldq_as_shq"} <= {*strata, "base"}
    for arm in arms:
        del arm["data"], arm["run"]["output_dir"]
    assert all(arm == arms[0] for arm in arms)


def test_the_options_of_the_strata_of_front_loading_are_options() -> None:
    options = parse(CurateOptions, ["--recipe", str(EXAMPLES / "front_loading/curate.yaml")])
    assert [one.name for one in options.datasets()] == ["ldq", "shq"] and options.budget == 0.2 * 400e9
    assert [one.name for one in options.evaluation_sets()] == ["gsm8k", "math500"]


def test_the_arms_of_fine_tuning_warm_up_for_5_percent_of_their_steps() -> None:
    path = EXAMPLES / "front_loading/sft_8b.yaml"
    rows = re.findall(r"^\| .* \|$", (path.parent / "README.md").read_text(), re.MULTILINE)
    arms = [re.findall(r"--[\w.]+=[^\s`\"]+", row) for row in rows if "--optimizer.warmup_steps=" in row]
    assert len(arms) == 3
    for options in arms:
        given = [option for option in options if "init_from" not in option]  # no checkpoint is here
        recipe = load_recipe(FinetuneRecipe, [str(path), *given])[0]
        assert recipe.optimizer.warmup_steps == 0.05 * recipe.training.num_steps
