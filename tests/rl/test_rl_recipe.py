"""The recipe of reinforcement learning: what follows from it, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.rl import can_be_appended
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.program import train
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl import serve
from megatron_tpt.rl.prompts import check_answers
from megatron_tpt.rl.start import describe_engine


def recipe(**sections: dict[str, Any]) -> RLRecipe:
    fields: dict[str, dict[str, Any]] = {
        "data": {"train": ["problems.jsonl"]},
        "training": {"num_steps": 8, "global_batch_size": 16, "sequence_length": 128},
        "rollouts": {"num_prompts": 4, "num_samples": 8},
        "checkpoint": {"save_interval": 2},
    }
    for name, changes in sections.items():
        fields[name] = fields.get(name, {}) | changes
    made = recipe_from_dict(RLRecipe, fields)
    assert isinstance(made, RLRecipe)
    return made


def test_the_recipe_of_the_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/rl.md").read_text()
    shown = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    fields = yaml.safe_load(shown[1])
    del fields["training"]["init_from"]
    made = recipe_from_dict(RLRecipe, fields)
    assert isinstance(made, RLRecipe)
    made.check(2)
    assert made.checkpoint.save_interval == made.steps_per_iteration == 4


def test_an_iteration_has_the_steps_of_its_rollouts() -> None:
    assert recipe().steps_per_iteration == 2
    assert recipe(algorithm={"num_epochs": 4}).steps_per_iteration == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"num_prompts": 3}}, "rollouts of an iteration are not a multiple"),
        ({"training": {"num_steps": 7}}, "not a multiple of the 2 steps of an iteration"),
        ({"rollouts": {"max_new_tokens": 128}}, "leaves no room for a prompt"),
        ({"rollouts": {"num_samples": 1, "num_prompts": 16}}, "nothing to compare a rollout with"),
        (
            {"rollouts": {"num_samples": 1, "num_prompts": 16, "dynamic_sampling": True}, "algorithm": {"name": "ppo"}},
            "drops every group of rollouts.num_samples=1",
        ),
        ({"repro": {"enabled": True}, "data": {"answer_type": "code"}}, "data.answer_type=code has tests"),
        ({"rewards": {"overlong_buffer": 65}}, "is more than rollouts.max_new_tokens=64"),
        ({"training": {"fp8": "tensorwise"}}, "training.fp8=tensorwise is not supported by reinforcement learning"),
        ({"faults": {"on_loss_spike": "skip"}}, "faults.on_loss_spike=skip is not supported by reinforcement learning"),
        ({"data": {"train": []}}, "data.train is empty"),
        ({"rollouts": {"engine": "endpoint"}}, "rollouts.engine=endpoint needs rollouts.endpoints"),
        (
            {"rollouts": {"engine": "vllm-server", "weight_transfer": "nccl"}},
            "rollouts.weight_transfer=nccl is for rollouts.engine=endpoint",
        ),
        (
            {"rollouts": {"engine": "endpoint", "endpoints": ["http://a/v1"], "weight_transfer": "ipc"}},
            "rollouts.weight_transfer=ipc is for rollouts.engine=vllm-server",
        ),
        ({"rollouts": {"engine": "endpoint", "endpoints": ["node7:8000"]}}, "endpoint 'node7:8000': not a URL"),
        (
            {"rollouts": {"dynamic_sampling": True, "prompts_per_wave": 1, "max_waves": 3}},
            "max_waves=3 of prompts_per_wave=1 have 3 prompts, and an iteration has num_prompts=4",
        ),
        ({"training": {"validation_interval": 2}}, "does not validate"),
        ({"data": {"tokenizer": "somewhere"}}, "data.tokenizer=somewhere is not used"),
        ({"training": {"batch_size_ramp": [{"num_steps": 2, "global_batch_size": 8}]}}, "batch_size_ramp.*supported"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**changes).check(1)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("algorithm", {"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
        ("algorithm", {"mismatch_lower": 3.0}, "mismatch_lower=3.0 must be at most"),
        ("rollouts", {"temperature": 0}, "temperature=0"),
        ("rollouts", {"gpu_memory": 1.5}, "gpu_memory=1.5"),
        ("rollouts", {"patience_s": 0}, "patience_s=0"),
        ("rollouts", {"weight_transfer": "rdma"}, "weight_transfer"),
        ("data", {"answer_pattern": "("}, r"data\.answer_pattern='\(' is no regular expression: missing \)"),
        ("repro", {"ema_weight": 0}, "ema_weight=0"),
        ("repro", {"answer_template": "\\boxed{}{}"}, "must have one"),
    ],
)
def test_values_out_of_bounds_are_refused(section: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**{section: fields})


def test_a_setting_without_effect_is_named(tmp_path: Path) -> None:
    given = recipe(
        algorithm={"kl_coefficient": 0.5, "lam": 0.9},
        repro={"alpha": 0.2},
        critic={"warmup_iterations": 3},
        data={"allow_unsandboxed_code": True},
    )
    lines = "\n".join(given.warnings())
    for name in (
        "algorithm.kl_coefficient", "algorithm.lam", "repro.alpha", "critic.warmup_iterations",
        "data.allow_unsandboxed_code",
    ):  # fmt: skip
        assert f"{name}=" in lines
    assert "checkpoint.save_interval" not in lines


@pytest.mark.parametrize(
    ("rollouts", "line"),
    [
        ({}, "rollouts: vllm in every process"),
        ({"engine": "vllm-server"}, r"rollouts: a vLLM server for every process; weights by files, .* are free at "),
        (
            {"engine": "endpoint", "endpoints": ["http://a:1/v1"], "weight_transfer": "nccl"},
            "rollouts: http://a:1/v1; weights by nccl",
        ),
    ],
)
def test_a_dry_run_says_what_samples(rollouts: dict[str, Any], line: str, tmp_path: Path) -> None:
    model = {"vocab_size": 100}
    given = recipe(rollouts=rollouts, run={"output_dir": str(tmp_path / "run")}, model=model)
    assert re.match(line, describe_engine(given))


def test_a_dry_run_does_not_promise_what_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a time that includes the rollouts."""
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    sections = {"data": {"train": ["none.jsonl"]}, "model": {"vocab_size": 64}, "training": {"num_steps": 8}}
    path.write_text(yaml.safe_dump(sections | {"run": {"output_dir": str(run)}}))
    train(RLRecipe, [str(path), "--dry-run", "--device=h100"])
    said = capsys.readouterr().out
    assert "warning: training.init_from is empty: a run needs the checkpoint to start from" in said
    assert "random weights" not in said
    assert "GPU-hours, rollouts, their scoring, PPO's critic and checkpoints apart (" in said


def test_a_server_on_the_same_gpu_leaves_a_share_of_its_memory() -> None:
    assert recipe().gpu_share == 1
    assert recipe(rollouts={"engine": "vllm-server", "gpu_memory": 0.25}).gpu_share == 0.75
    assert recipe(rollouts={"engine": "vllm-server"}).gpu_share == pytest.approx(0.08)


def test_settings_of_servers_have_no_effect_on_an_engine_in_the_process() -> None:
    given = recipe(rollouts={"endpoints": ["http://a/v1"], "weight_transfer": "nccl", "weights_dir": "w"})
    lines = "\n".join(given.warnings())
    for name in ("endpoints", "weight_transfer", "weights_dir"):
        assert f"rollouts.{name}=" in lines


def test_a_run_that_could_not_find_its_rollouts_again_is_warned(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    given = recipe(data={"train": [str(problems)]}, checkpoint={"save_interval": 0})
    assert any("checkpoint.save_interval=0" in line for line in given.warnings())


def test_an_answer_that_cannot_be_read_is_named_before_anything_starts(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 + 2", "answer": "many"}\n')
    given = recipe(data={"train": [str(problems)], "answer_type": "number"})
    with pytest.raises(UserError, match=r"problems\.jsonl:2: the right answer 'many' is none of .*answer_type=number"):
        given.prepare_data()


@pytest.mark.parametrize(
    ("answer_type", "answer"),
    [
        ("number", "She has 2 + 1 apples.\n#### 3"),
        ("math", "so it is \\boxed{3}"),
        ("exact", ["3", "three"]),
        ("choice", 1),
    ],
)
def test_an_answer_that_no_model_would_write_is_not_appended(tmp_path: Path, answer_type: str, answer: Any) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "1 + 2", "answer": answer}) + "\n")
    fields = {"data": {"train": [str(problems)], "answer_type": answer_type}}
    check_answers(recipe(**fields))
    with pytest.raises(UserError, match=r"problems\.jsonl:1: repro\.enabled=true appends the right answer"):
        check_answers(recipe(**fields, repro={"enabled": True}))


def test_the_rows_that_are_checked_are_those_that_are_trained_on(tmp_path: Path) -> None:
    """They are read once."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    given = recipe(data={"train": [str(problems)], "answer_type": "number"})
    check_answers(given)
    problems.write_text('{"prompt": "1 + 2", "answer": "many"}\n')
    assert [one.answer for one in given.problems] == ["2"]


def test_the_discount_has_an_effect_on_process_rewards() -> None:
    given = {"algorithm": {"gamma": 0.9}}
    assert any("algorithm.gamma" in line for line in recipe(**given).warnings())
    assert not any("algorithm.gamma" in line for line in recipe(**given, repro={"enabled": True}).warnings())


def test_a_recipe_that_asks_no_server_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would start, without the routes for updates, and the training not find it."""
    path = tmp_path / "recipe.yaml"
    path.write_text("{data: {train: [problems.jsonl]}, rollouts: {engine: vllm-server}}")
    monkeypatch.setattr("sys.argv", ["serve", "8000", str(path)])
    with pytest.raises(UserError, match=r"rollouts\.engine=vllm-server does not ask a server that runs already"):
        serve.main()


@pytest.mark.parametrize("answer", ["", " "])
def test_an_answer_without_text_cannot_be_appended(answer: str) -> None:
    """L would be the mean over no token."""
    assert not can_be_appended(answer)


def test_without_a_start_there_is_nothing_to_reinforce() -> None:
    with pytest.raises(UserError, match=r"training.init_from is empty"):
        _ = recipe().tokenizer_path
