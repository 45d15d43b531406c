"""The study and the part of it that `make repro-demo` runs; with fewer steps and problems every step is the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
import repro_arms
import yaml
import zstandard

from megatron_tpt.config.load import load_recipe
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.studies.expand import Graph, expand
from megatron_tpt.studies.options import StudyOptions
from megatron_tpt.studies.run import run_study
from megatron_tpt.studies.study import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "parcels": ["--num-examples", "400", "--num-prompts", "100", "--num-problems", "2"],
    "warm": ["--training.num_steps=20", "--optimizer.warmup_steps=2", "--optimizer.wsd_decay_steps=5"],
    "train": ["--training.num_steps=2", "--rollouts.num_prompts=2", "--training.global_batch_size=16"],
    "measure": ["--num-samples", "2"],
}
ARMS = ["GRPO with length penalty", "REPRO", "REPRO with shuffled rewards", "PPO with REPRO"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def graph_of(text: str, folder: Path) -> Graph:
    (folder / "study.yaml").write_text(text)
    return expand(load_study(folder / "study.yaml"))


def test_the_study_has_the_other_algorithms_with_one_seed_alone() -> None:
    nodes = expand(load_study(REPOSITORY / "examples/repro_demo/study.yaml")).nodes.values()
    trained = [(node.levels["arm"], node.levels["seed"]) for node in nodes if node.step == "train"]
    assert len(trained) == len(set(trained)) == 5 * 5 + 4
    assert {arm for arm, seed in trained if seed != "1"} == {
        "GRPO", "GRPO with length penalty", "REPRO", "REPRO with shuffled rewards", "REPRO with constant rewards"
    }  # fmt: skip
    assert [sum(node.step == step for node in nodes) for step in ("warm", "measure", "claims")] == [5, 5, 1]


def test_seed_0_which_chose_the_settings_is_not_in_the_study() -> None:
    assert (
        0 not in yaml.safe_load(repro_arms.STUDY.read_text())["factors"]["seed"] and repro_arms.DemoOptions().seed == 0
    )


def test_the_demo_is_two_arms_of_the_study(tmp_path: Path) -> None:
    nodes = graph_of(repro_arms.part_of_study(repro_arms.DemoOptions()), tmp_path).nodes.values()
    assert [node.levels["arm"] for node in nodes if node.step == "train"] == ["GRPO", "REPRO"]
    [measure] = (node for node in nodes if node.step == "measure")
    words = measure.command()
    assert words[words.index("--names") + 1 :][:3] == ["start", "GRPO", "REPRO"]


def test_an_arm_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="--arms other: there is none of this name; there are start, GRPO, "):
        repro_arms.part_of_study(repro_arms.DemoOptions(arms=["other"]))


def test_every_arm_has_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"num_layers": 2, "hidden_size": 64}}))
    arms = yaml.safe_load(repro_arms.STUDY.read_text())["factors"]["arm"]
    recipes = {}
    for arm, level in arms.items():
        words = [
            str(repro_arms.STUDY.parent / "rl.yaml"),
            f"--training.init_from={tmp_path}",
            *level.get("settings", []),
        ]
        recipes[arm], _ = load_recipe(RLRecipe, words)
    assert {arm for arm, recipe in recipes.items() if recipe.repro.enabled} == {arm for arm in arms if "REPRO" in arm}
    assert recipes["REPRO"].repro.num_segments < 9 and recipes["REPRO"].repro.control == "none"
    assert recipes["GRPO with length penalty"].rewards.length_penalty > 0 == recipes["REPRO"].rewards.length_penalty


@pytest.mark.example(minutes=8)
@pytest.mark.timeout(2400)
def test_the_miniature_compares_its_arms(tmp_path: Path) -> None:
    target = re.search(r"^repro-demo: setup\n\t\$\(PY\) (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert target is not None and shlex.split(target[1])[0] == "examples/repro_demo/repro_arms.py"
    content = yaml.safe_load(repro_arms.part_of_study(repro_arms.DemoOptions(arms=ARMS)))
    for name, options in SMALL.items():
        content["steps"][name]["command"] += options
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    output = tmp_path / "runs"
    run_study(StudyOptions(tmp_path / "study.yaml", output, scale=ScaleOptions(num_workers=2)))
    [measured] = output.glob("measure/*/output/policies.json")
    policies = {one["name"]: one for one in json.loads(measured.read_text())["policies"]}
    assert list(policies) == ["start", *ARMS]
    for one in policies.values():
        assert one["num_answers"] == 2 * one["num_problems"] == 2 * len(one["problems"]) == 2 * 2 * 7
        assert len(one["curves"]) == 2 and all(len(curve) == 10 and max(curve) < 0 for curve in one["curves"])
    [page] = output.glob("claims/*/output/report.md")
    assert "- REPRO against REPRO with shuffled rewards (1 seed): accuracy: " in page.read_text()
    process = {arm: first_process_advantages(output, arm) for arm in ARMS[1:]}
    assert process["REPRO"] != process["REPRO with shuffled rewards"]  # of the same rollouts
    assert (output / "report/report.md").is_file()


def first_process_advantages(output: Path, arm: str) -> list[list[float]]:
    """Those of the rollouts of an arm's first iteration."""
    [path] = output.glob(f"train/{arm.replace(' ', '-')}_0-*/output/rollouts/iteration_00000000.jsonl.zst")
    with zstandard.open(path, "rt") as file:
        return [json.loads(line)["columns"]["process"] for line in file]
