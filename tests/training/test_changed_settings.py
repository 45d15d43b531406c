"""Settings that are changed on resume: they take effect from the first step on, are warned of, or are refused."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_runs import FINETUNE, PRETRAIN, Train, Workers

from megatron_tpt import platform
from megatron_tpt.config.effects import has_effect
from megatron_tpt.config.load import load_recipe, recipe_from_dict, to_dict
from megatron_tpt.config.on_change import Effect, effects_of
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.checkpoint_state import members
from megatron_tpt.training.optimizer import build_schedule
from megatron_tpt.training.pretrain_data import build_pretrain_data
from megatron_tpt.training.trainer import Trainer

PLAIN = {"parallel": {"distributed_optimizer": False}}
MUON = {"optimizer": {"name": "muon", "adam_learning_rate": 3e-3, "muon_matmul_precision": "highest"}}
LAYOUTS = {
    "adam": {},
    "adam, every rank for itself": {**PLAIN, "training": {"dtype": "bfloat16"}},
    "adam, dp_reshardable": {"checkpoint": {"optimizer_sharding": "dp_reshardable"}},
    "muon": {**PLAIN, **MUON},
    "muon, split": {**MUON, "training": {"dtype": "bfloat16"}},
}
NEW = {
    "learning_rate": 3e-3,
    "min_learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 1,
    "decay_steps": 8,
    "weight_decay": 0.5,
    "adam_beta1": 0.7,
    "adam_beta2": 0.8,
    "adam_epsilon": 1e-3,
    "clip_grad": 0.2,
}


def make_recipe(folder: Path, *changes: dict, program: type = PretrainRecipe) -> PretrainRecipe:
    raw: dict = {
        "run": {"output_dir": str(folder)},
        "model": {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 100, "qkv_bias": True},
        "training": {"num_steps": 6, "dtype": "float32", "sequence_length": 16, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "data": {"mock": True},
    }
    for change in changes:
        for section, values in change.items():
            raw[section] = {**raw.get(section, {}), **values}
    return recipe_from_dict(program, raw)


def train_steps(trainer: Trainer, num_steps: int) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and rate of that many steps."""
    rows = []
    with trainer.running():
        for batch in itertools.islice(trainer.batches(), num_steps):
            report = trainer.step(batch)
            sums = dict(zip(trainer.objective.sum_names, report.sums.tolist(), strict=True))
            rows.append((sums["loss"], report.grad_norm, report.learning_rate))
    return rows


def change_in_place(trainer: Trainer, recipe: PretrainRecipe) -> None:
    """What a user of the optimizer would do by hand between two steps."""
    new = recipe.optimizer
    for member in members(trainer.model.optimizer):
        member.config.clip_grad = new.clip_grad
        for group in member.param_groups:
            rate = (new.adam_learning_rate or new.learning_rate) if "betas" in group else new.learning_rate
            group["max_lr"], group["min_lr"] = rate, new.min_learning_rate * rate / new.learning_rate
            if "betas" in group:
                group["betas"], group["eps"] = (new.adam_beta1, new.adam_beta2), new.adam_epsilon
            else:
                group["momentum"] = new.muon_momentum
    trainer.model.schedule = build_schedule(trainer.model.optimizer, recipe)
    trainer.model.schedule.step(trainer.global_step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_updates_as_one_that_was_changed_in_place(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_muon = "muon" in layout
    new = {**NEW, **({"adam_learning_rate": 1e-3, "muon_momentum": 0.5} if is_muon else {})}
    before = make_recipe(tmp_path, LAYOUTS[layout])
    after = make_recipe(tmp_path, LAYOUTS[layout], {"optimizer": new})
    with platform.process_groups(ParallelConfig()):
        trainer = build_trainer(before, build_pretrain_data(before), [])
        train_steps(trainer, 3)
        trainer.start_saving().finish()
        unchanged = train_steps(build_trainer(before, build_pretrain_data(before), []), 3)
        change_in_place(trainer, after)
        expected = train_steps(trainer, 3)
    capsys.readouterr()
    with platform.process_groups(ParallelConfig()):
        resumed = train_steps(build_trainer(after, build_pretrain_data(after), []), 3)
    reported = capsys.readouterr().out
    assert resumed == expected
    assert [row[2] for row in resumed] == pytest.approx([3e-3 - (k / 7) * 2e-3 for k in (2, 3, 4)])
    assert resumed[1:] != unchanged[1:]
    assert "warning: other settings than those of" in reported and "warning: the learning rate continues at" in reported
    for name, value in new.items():
        before_value = to_dict(before)["optimizer"][name]
        was = "null" if before_value is None else before_value
        assert f"optimizer.{name}={value} ({was} there)" in reported


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        pytest.param(["--parallel.fsdp=optim_grads_params"], 1e-5, marks=pytest.mark.slow),
        pytest.param(["--parallel.distributed_optimizer=true"], 1e-5, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "dp2"],
)
def test_two_processes_take_a_new_rate_too(
    options: list[str], rel: float, train: Train, recipe: dict, tmp_path: Path
) -> None:
    """Against one process, whose optimizer is checked above."""
    changes = {"training": {**recipe["training"], "num_steps": 4}, "checkpoint": {"save_interval": 2}}
    new = {"optimizer": {**recipe["optimizer"], "learning_rate": 2e-3, "weight_decay": 0.4, "adam_beta2": 0.8}}
    results = []
    for name, own, num_processes in (("one", [], 1), ("two", options, 2)):
        train(name, *own, changes=changes, num_processes=num_processes)
        shutil.rmtree(tmp_path / name / "checkpoints/step_00000004")
        metrics = train(name, *own, changes=changes | new, num_processes=num_processes)
        results.append([row[key] for row in metrics[-2:] for key in ("loss", "grad_norm", "learning_rate")])
    assert results[1] == pytest.approx(results[0], rel=rel)
    assert results[0][2] == pytest.approx(2e-3)


def test_parameters_change_groups_with_decay_embeddings(tmp_path: Path) -> None:
    """The moments stay with their parameters: without a decay to apply, nothing changes."""
    tiny = {"optimizer": {"weight_decay": 1e-30}}
    for name, layout in (("adam", PLAIN), ("muon", {**PLAIN, "optimizer": MUON["optimizer"]})):
        before = make_recipe(tmp_path / name, layout, tiny)
        after = make_recipe(tmp_path / name, layout, tiny, {"optimizer": {"decay_embeddings": False}})
        with platform.process_groups(ParallelConfig()):
            trainer = build_trainer(before, build_pretrain_data(before), [])
            train_steps(trainer, 3)
            trainer.start_saving().finish()
            expected = train_steps(trainer, 3)
            resumed = build_trainer(after, build_pretrain_data(after), [])
            assert train_steps(resumed, 3) == [pytest.approx(row, rel=1e-5) for row in expected]
            undecayed = [group["params"] for group in resumed.model.optimizer.param_groups if group["wd_mult"] == 0.0]
            num_embeddings = sum(parameter.ndim == 2 for parameters in undecayed for parameter in parameters)
            assert num_embeddings == 2, name


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"rotary_base": 500.0}},
        {"model": {"norm_epsilon": 0.1}},
        {"model": {"rope_scaling_factor": 8.0, "rope_original_context": 8}},
        {"model": {"hidden_dropout": 0.5}},
        {"training": {"dtype": "bfloat16"}},
    ],
    ids=lambda change: "-".join(f"{name}" for values in change.values() for name in values),
)
def test_what_is_said_to_take_effect_does(change: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = make_recipe(tmp_path), make_recipe(tmp_path, change)
    with platform.process_groups(ParallelConfig()):
        trainer = build_trainer(before, build_pretrain_data(before), [])
        train_steps(trainer, 2)
        trainer.start_saving().finish()
        unchanged = train_steps(trainer, 1)
        resumed = train_steps(build_trainer(after, build_pretrain_data(after), []), 1)
    assert resumed[0][:2] != unchanged[0][:2]
    assert resumed[0][0] == pytest.approx(unchanged[0][0], rel=0.2), "the weights are the checkpoint's"
    reported = capsys.readouterr().out
    for section, values in change.items():
        for name, value in values.items():
            assert re.search(rf"warning: other settings .*{section}\.{name}={value} \(", reported)


@dataclasses.dataclass
class Finished:
    """A run that has ended, and its recipe."""

    path: Path
    cls: type
    saved: dict

    def dry_run(self, *overrides: str) -> None:
        assert prepare(*load_recipe(self.cls, [str(self.path), *overrides, "--dry-run"])) is None

    @property
    def fields(self) -> list[tuple[str, type, str]]:
        return [
            (section, cls, field.name)
            for section, cls in get_type_hints(self.cls).items()
            if dataclasses.is_dataclass(cls)
            for field in dataclasses.fields(cls)
        ]


def _finish(cls: type, content: dict, workers: Workers, folder: Path) -> Finished:
    path = folder / f"{cls.__name__}.yaml"
    path.write_text(yaml.safe_dump({**content, "run": {"output_dir": str(folder / cls.__name__)}}))
    workers.run(PRETRAIN if cls is PretrainRecipe else FINETUNE, [str(path)], 1)
    saved = yaml.safe_load((folder / cls.__name__ / "run.yaml").read_text())
    return Finished(path, cls, saved)


@pytest.fixture(scope="module")
def finished(recipe: dict, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """A pre-training run of four steps and a fine-tuning run from its weights."""
    folder = tmp_path_factory.mktemp("finished")
    training = {**recipe["training"], "num_steps": 4}
    pretrained = _finish(PretrainRecipe, {**recipe, "training": training}, workers, folder)
    examples = folder / "examples.jsonl"
    examples.write_text("".join(f'{{"prompt": "sule {i} ?", "response": "miga {i}"}}\n' for i in range(40)))
    start = folder / "PretrainRecipe/checkpoints/latest"
    content = {"training": {**training, "init_from": str(start)}, "data": {"train": [str(examples)]}}
    return [pretrained, _finish(FinetuneRecipe, recipe | content, workers, folder)]


# What no rule makes from the value of today: given, or without another value that could be given here.
OTHER: dict[str, Any] = {
    "run.time_limit_min": 10.0,
    "data.cache_dir": "elsewhere",
    "checkpoint.keep_last": 2,
    "profiling.ranks": [0, 1],
    "training.skip_steps": [1],
    "training.batch_size_ramp": [{"num_steps": 5, "global_batch_size": 4}],
    "model.num_query_groups": 4,
    "model.head_dim": 16,
    "model.vocab_size": 1000,
    "model.hidden_dropout": 0.5,
    "model.rope_scaling_factor": 2.0,
    "logging.peak_tflops": 1.0,
    "training.num_steps": 5,
}


def another(field: tuple[str, type, str], value: Any, factor: int = 2) -> Any:
    """Another value for a field, None where there is no rule for one."""
    section, cls, name = field
    if f"{section}.{name}" in OTHER:
        return OTHER[f"{section}.{name}"]
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is Literal:
        others = [one for one in get_args(hint) if one != value]
        return others[factor % len(others)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * factor or factor
    if isinstance(value, float):
        return value / factor or 1 / factor
    return 2 if int in get_args(hint) else 0.5 if float in get_args(hint) else None


def outcome(run: Finished, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a dry run says: its error, or what it prints."""
    capsys.readouterr()
    try:
        run.dry_run(*overrides)
    except UserError as error:
        return f"error: {error}"
    return capsys.readouterr().out


def is_as_the_table_says(effect: Effect, name: str, value: str, before: str, reported: str, allowed: str) -> bool:
    """Whether an outcome, and that with data.allow_change, are those of an effect."""
    here = re.escape(f"{name}={value} ({before} there)")
    was = re.search(rf"error: .* was written with .*{re.escape(f'{name}={before}')}", reported) is not None
    if effect in (Effect.WARNED, Effect.PRECISION):
        return re.search(rf"warning: other settings than .* take effect after step 4: .*{here}", reported) is not None
    if effect is Effect.NONE:
        return re.search(rf"warning: {here} has no effect: ", reported) is not None
    if effect is Effect.REFUSED:
        return was
    if effect is Effect.ALLOWED:
        return was and "data.allow_change" in reported and "warning: other batches than" in allowed
    return "error: " not in reported and f"{name}=" not in "".join(re.findall("warning: other settings.*", reported))


def check(
    run: Finished, field: tuple[str, type, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: int = 2
) -> str:
    """Change a field and resume. Returns the effect; "" where the new value is not valid alone."""
    section, cls, name = field
    before = run.saved[section][name]
    value = another(field, before, factor)
    option = f"--{section}.{name}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
    if value is None or outcome(run, [option, f"--run.output_dir={tmp_path / 'new'}"], capsys).startswith("error: "):
        return ""
    reported, allowed = (outcome(run, [option, *more], capsys) for more in ([], ["--data.allow_change=true"]))
    arguments = load_recipe(run.cls, [str(run.path), option])[0]
    effect, _ = effects_of(cls, name)
    if effect is Effect.CONTENT or not has_effect(arguments, section, name):
        effect = Effect.FREE
    shown = [str(one).lower() if isinstance(one, bool) else "null" if one is None else one for one in (value, before)]
    if isinstance(value, list):
        shown = ["[{num_steps: 5, global_batch_size: 4}]", "[]"]
    assert is_as_the_table_says(effect, f"{section}.{name}", *map(str, shown), reported, allowed), (effect, reported)
    return effect.name


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_random_field_has_the_effect_that_the_table_gives_it(
    data: st.DataObject, finished: list[Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.draw(st.sampled_from(finished), label="run")
    factor = data.draw(st.integers(2, 9), label="factor")
    check(run, data.draw(st.sampled_from(run.fields), label="field"), tmp_path, capsys, factor)


@pytest.mark.slow
def test_every_field_has_the_effect_that_the_table_gives_it(
    finished: list[Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [check(run, field, tmp_path, capsys) for run in finished for field in run.fields]
    assert {"FREE", "WARNED", "NONE", "REFUSED", "ALLOWED", "LAYOUT", "PRECISION"} <= set(found)
    assert found.count("") < 0.4 * len(found), "most fields have another value that can be given on a CPU"


def test_a_dry_run_says_what_the_start_says(
    finished: list[Finished], workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished[0]
    shutil.copytree(run.path.parent / "PretrainRecipe", tmp_path / "run", symlinks=True)
    overrides = [f"--run.output_dir={tmp_path / 'run'}", "--model.rotary_base=500", "--model.init_std=0.5"]
    overrides += ["--optimizer.learning_rate=2e-3", "--training.num_steps=5", "--data.loss_on=document"]
    overrides += ["--data.allow_change=true", "--training.global_batch_size=4"]
    warnings = [line for line in outcome(run, overrides, capsys).splitlines() if line.startswith("warning")]
    printed = workers.run(PRETRAIN, [str(run.path), *overrides], 1).splitlines()
    assert len(warnings) == 4 and set(warnings) <= set(printed)


def test_a_model_that_computes_otherwise_than_init_from_is_warned_of(
    finished: list[Finished], workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["--training.num_steps=3", "--model.norm_epsilon=0.01", "--model.rotary_base=500", "--model.init_std=1"]
    for number, run in enumerate(finished):
        start = (run.path.parent / "PretrainRecipe/checkpoints/latest").resolve()
        own = [*overrides, f"--run.output_dir={tmp_path / str(number)}", f"--training.init_from={start}"]
        reported = outcome(run, own, capsys)
        settings = "model.rotary_base=500.0 (10000.0 there), model.norm_epsilon=0.01 (1e-05 there)"
        lines = [
            f"warning: the model computes with other settings than {start} was trained with: {settings}",
            f"warning: model.init_std=1.0 (0.02 there) has no effect: the weights are those of {start}",
        ]
        assert set(lines) <= set(reported.splitlines())
    assert set(lines) <= set(workers.run(FINETUNE, [str(run.path), *own], 1).splitlines())
    more_rows = [*own[1:], "--training.num_steps=4", "--model.vocab_size=1000", f"--run.output_dir={tmp_path}/larger"]
    assert "starts in" in outcome(run, more_rows, capsys)
    assert "finished: 4 steps" in workers.run(FINETUNE, [str(run.path), *more_rows], 1)
    refused = outcome(run, [*own, "--model.qk_norm=true", f"--run.output_dir={tmp_path}/c"], capsys)
    assert refused.startswith(f"error: training.init_from={start} has a model of model.qk_norm=false")


def test_random_tokens_do_not_continue_a_run_on_text(
    finished: list[Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    reported = outcome(finished[0], ["--data.mock=true", "--data.train=[]", "--model.vocab_size=320"], capsys)
    assert "was written with data.mock=false: resume with that" in reported
