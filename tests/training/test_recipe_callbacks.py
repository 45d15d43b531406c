"""Callbacks that a recipe names: a user's own from a file of theirs, built-in ones with settings, and every mistake."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from training_runs import finish, start_training

from megatron_tpt.config.load import load_recipe, recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.recipe_callbacks import build_callbacks, built_in_callbacks

OWN = '''
from dataclasses import dataclass, field
from typing import Any, Literal
from megatron_tpt.training.trainer import Callback, StepReport, Trainer

@dataclass
class Limits:
    low: float
    high: float = 1.0

class StopAfter(Callback):
    """Counts the steps of all starts, and stops this one after some."""

    def __init__(self, step: int, reason: Literal["enough", "tired"] = "enough", limits: Limits | None = None) -> None:
        self.step, self.reason, self.num_seen = step, reason, 0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.num_seen += 1
        if trainer.global_step == self.step:
            trainer.stop_reason = f"{self.reason}: {self.num_seen} steps seen"

    def state(self) -> dict[str, Any]:
        return {"num_seen": self.num_seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_seen = state["num_seen"]

@dataclass(eq=False)
class Listed(Callback):
    names: list[str] = field(default_factory=list)

class Validate(Callback): pass

class Untyped(Callback):
    def __init__(self, anything=None): pass

class Picky(Callback):
    def __init__(self, share: float):
        raise ValueError(f"share={share} must be below 1")
'''
STOP = "tpt_own_callbacks:StopAfter"


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a module of callbacks, one that needs what is not there, and one that is broken."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tpt_own_callbacks.py").write_text(OWN)
    (folder / "tpt_needy.py").write_text("import tpt_nowhere\n")
    (folder / "tpt_broken.py").write_text("\n1 / 0\n")
    (folder / "tpt_unfinished.py").write_text("class Own(\n")
    return folder


def test_a_users_callback_acts_and_its_state_is_resumed(
    recipe: dict, own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{own_folder}:{sys.path[0]}:{Path(__file__).parents[2]}")
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    raw = {**recipe, "run": {"output_dir": str(run)}, "callbacks": {STOP: {"step": 3}}}
    path.write_text(yaml.safe_dump(raw))
    process = start_training(path)
    output, _ = process.communicate()
    assert process.returncode == 75 and "stopped after step 3 (enough: 3 steps seen)" in output
    process = start_training(path, f"--callbacks={{{STOP}: {{step: 5, reason: tired}}}}")
    output, _ = process.communicate()
    assert process.returncode == 75 and "stopped after step 5 (tired: 5 steps seen)" in output
    assert f"take effect after step 3: callbacks.{STOP}={{step: 5, reason: tired}} ({{step: 3}} there)" in output
    path.write_text(yaml.safe_dump({**raw, "callbacks": {}, "training": {**raw["training"], "num_steps": 6}}))
    assert "finished: 6 steps" in finish(start_training(path))
    saved = yaml.safe_load((run / "checkpoints/step_00000005/recipe.yaml").read_text())
    assert saved["callbacks"] == {STOP: {"step": 5, "reason": "tired"}}


def refusal(tmp_path: Path, text: str, *options: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}\nmodel: {{vocab_size: 100}}\ndata: {{mock: true}}\n")
    with pytest.raises(UserError) as error:
        prepare(*load_recipe(PretrainRecipe, [str(path), "--dry-run", *options]))
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize(
    ("callbacks", "reported"),
    [
        ("[profile]", "recipe.yaml:1: callbacks: ['profile'] is not a mapping"),
        ("{profile: 5}", "recipe.yaml:1: callbacks.profile: 5 is not a mapping"),
        ("{profil: {}}", "recipe.yaml:1: callbacks.profil: unknown; did you mean profile?"),
        ("{mine: {}}", "recipe.yaml:1: callbacks.mine: unknown: name one of watchdog, stop_early, "),
        ("{profile: {max_events: 5}}", "callbacks.profile.max_events: unknown; did you mean max_memory_events?"),
        ("{profile: {max_memory_events: many}}", "callbacks.profile.max_memory_events: 'many' is not a whole number"),
        ("{validate: {\n interval: 5}}", "recipe.yaml:2: callbacks.validate.interval: unknown; Validate has"),
        ("{tpt_nowhere:Own: {}}", "callbacks.tpt_nowhere:Own: there is no module tpt_nowhere in "),
        ("{'tpt nowhere:Own': {}}", "'tpt nowhere' is no name of a module: write package.module:Class"),
        ("{tpt_needy:Own: {}}", "tpt_needy needs the module tpt_nowhere, which is not installed: install it"),
        ("{tpt_broken:Own: {}}", "tpt_broken.py:2: ZeroDivisionError: division by zero): fix it there"),
        ("{tpt_unfinished:Own: {}}", "tpt_unfinished.py:1: SyntaxError: "),
        ("{tpt_own_callbacks:Own: {}}", "the module tpt_own_callbacks has no Own: write package.module:Class"),
        ("{tpt_own_callbacks:Limits: {}}", "Limits is no callback: derive it from megatron_tpt.training."),
        ("{tpt_own_callbacks:Validate: {}}", "Validate is the name of the class of validate too"),
        ("{tpt_own_callbacks:Untyped: {}}", "Untyped(anything) has no type, and a recipe gives int, "),
        ("{tpt_own_callbacks:StopAfter: {}}", "callbacks.tpt_own_callbacks:StopAfter: lacks step: give a whole number"),
        ("{tpt_own_callbacks:StopAfter: {step: 1, reason: no}}", "StopAfter.reason: False is not one of enough, tired"),
        ("{tpt_own_callbacks:StopAfter: {step: 1, limits: {}}}", "StopAfter.limits: lacks low: give a number"),
        ("{tpt_own_callbacks:StopAfter: {step: 1, stop: 2}}", "StopAfter.stop: unknown; did you mean step?"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_where_it_is(
    callbacks: str, reported: str, own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(own_folder)
    (line,) = refusal(tmp_path, f"callbacks: {callbacks}")
    assert reported in line and line.startswith("recipe.yaml:")


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "callbacks:\n  validate: {a: 1}", "--callbacks.profile.b=2", "--callbacks.own={}")
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:2", "callbacks.validate.a"],
        ["command line", "callbacks.profile.b"],
        ["command line", "callbacks.own"],
    ]


def test_settings_reach_the_callbacks_and_the_others_stay_as_they_are(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(own_folder)
    usual = [type(callback) for callback in default_callbacks()]
    assert [type(callback) for callback in build_callbacks({})] == usual == list(built_in_callbacks().values())
    section = {"tpt_own_callbacks:Listed": {"names": ["a"]}, STOP: {"step": 2}, "profile": {"max_memory_events": 7}}
    built = {type(callback).__name__: callback for callback in build_callbacks(section)}
    names = [kind.__name__ for kind in usual]
    assert list(built) == [*names[:7], "Listed", "StopAfter", *names[7:]] and names[7] == "SaveCheckpoints"
    assert (built["Listed"].names, built["StopAfter"].step, built["Profile"].max_memory_events) == (["a"], 2, 7)
    with pytest.raises(UserError, match=r"callbacks\.tpt_own_callbacks:Picky: share=2\.0 must be below 1"):
        build_callbacks({"tpt_own_callbacks:Picky": {"share": 2}})


def test_what_a_checkpoint_names_is_not_imported(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(own_folder)
    checkpoint = tmp_path / "checkpoints/step_00000002"
    checkpoint.mkdir(parents=True)
    saved = {"callbacks": {"tpt_broken:Own": {}}, "model": {"vocab_size": 100}, "data": {"train": ["a"]}}
    (checkpoint / "recipe.yaml").write_text(yaml.safe_dump(saved))
    raw = {"training": {"init_from": str(checkpoint)}, "data": {"train": ["b"], "allow_change": True}}
    recipe = recipe_from_dict(PretrainRecipe, {**raw, "run": {"output_dir": str(tmp_path)}}).resolve()
    recipe.check_callbacks({})
    assert recipe.callbacks == {} and len(recipe.data.phases) == 2
    assert [type(callback) for callback in recipe.build_callbacks()] == list(built_in_callbacks().values())


def test_the_documentations_example_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text().partition("## Callbacks of your own")[2]
    module, recipe = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    assert module and recipe
    (tmp_path / "my_callbacks.py").write_text(module[1])
    monkeypatch.chdir(tmp_path)  # of which a console script does not know
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (own,) = [one for one in build_callbacks(yaml.safe_load(recipe[1])["callbacks"]) if hasattr(one, "norm")]
    trainer = SimpleNamespace(stop_reason=None)
    for norm, num_tokens in ((0.04, 8), (0.06, 8), (0.04, 8), (0.03, 8), (0.0, 0), (0.02, 8)):
        assert trainer.stop_reason is None
        own.after_step(trainer, SimpleNamespace(grad_norm=norm, num_tokens=num_tokens))
    assert trainer.stop_reason == "a gradient norm below 0.05" and own.state() == {"num_low": 3}
