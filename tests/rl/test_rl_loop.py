"""The loop: the same gradients under every layout, engines that fail, what it logs, and it learns."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import (
    EVERY_STEP,
    NUMBERS,
    PPO,
    PROGRAM,
    THINKING,
    has_step,
    learned,
    make_problems,
    make_start,
    merged,
    rl_recipe,
    rollouts_of,
    write_recipe,
)
from torch.distributed.checkpoint import FileSystemReader
from training_runs import Workers, read_metrics

from megatron_tpt.config.load import read_yaml
from megatron_tpt.interop.checkpoint_reader import CheckpointReader
from megatron_tpt.rl.rollout_log import RolloutLog

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of 4": (1, {"training": {"micro_batch_size": 4}}),
    "tp2": (2, {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}}),
    "pp2": (2, {"parallel": {"pipeline_parallel_size": 2}}),
    "dp2": (2, {"parallel": {"distributed_optimizer": True}}),
}
KL: dict[str, Any] = {"algorithm": {"kl": "loss", "entropy_coefficient": 0.01, "num_epochs": 2}}


@pytest.mark.slow(minutes=4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["ppo", "kl"])
def test_a_step_has_the_same_gradient_under_every_layout(
    algorithm: str, layout: str, workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    """On the same rollouts, which are given by the log. The second iteration samples anew: its engines have the
    weights of a trainer that is spread over ranks, and are checked against it (rollouts.max_gap)."""
    changes = {"ppo": PPO, "kl": KL}[algorithm]
    alone = whole(algorithm, changes)
    num_processes, of_layout = LAYOUTS[layout]
    recipe = rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, changes, of_layout, EVERY_STEP))
    (tmp_path / "run/rollouts").mkdir(parents=True)
    steps = 32 // 16 * changes["algorithm"].get("num_epochs", 1)
    log = RolloutLog(alone / "rollouts")
    for path in (log.path(0), log.metrics_path(0)):
        shutil.copy(path, tmp_path / "run/rollouts")
    workers.run(PROGRAM, [str(write_recipe(recipe))], num_processes)

    def of_steps(run: Path, *numbers: int) -> dict[tuple[int, str], float]:
        names = ("loss", "grad_norm", "critic/loss", "critic/grad_norm")
        rows = [row for row in learned(run) if row["step"] in numbers]
        return {(row["step"], name): row[name] for row in rows for name in names if name in row}

    expected = of_steps(alone, 1)
    assert all(value > 0 for (_, name), value in expected.items() if "grad_norm" in name)
    assert len(expected) == (4 if algorithm == "ppo" else 2)
    assert of_steps(tmp_path / "run", 1) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for model in (".", "critic") if algorithm == "ppo" else (".",):
        expected_gradients, found = first_gradients(alone / model), first_gradients(tmp_path / "run" / model)
        assert expected_gradients.keys() == found.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    # An optimizer whose rate does not depend on the size of a gradient makes much of the rounding in it.
    later = range(2, steps + 1)
    assert of_steps(tmp_path / "run", *later) == pytest.approx(of_steps(alone, *later), rel=1e-2, abs=1e-4)


def first_gradients(run: Path) -> dict[str, torch.Tensor]:
    """Adam's first moments after the first step, a tenth of its gradients."""
    folder = run / "checkpoints/step_00000001"
    names = [name for name in FileSystemReader(folder).read_metadata().state_dict_metadata if ".exp_avg." in name]
    assert len(names) > 5
    return {name: CheckpointReader(folder).read(name) for name in names}


def test_an_engine_that_fails_is_opened_again_and_its_wave_sampled_again(
    workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    """Call 3 of the engine is the second wave, after two of probes and the first wave."""
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, PPO, EVERY_STEP)))
    workers.run("failing_rl", [str(recipe), "--fail=0:3"], 1)
    unbroken = whole("ppo", PPO)
    assert rollouts_of(tmp_path / "run") == rollouts_of(unbroken)
    assert learned(tmp_path / "run") == learned(unbroken)


@pytest.mark.slow(minutes=1)
def test_an_engine_that_fails_on_one_rank_is_opened_again_there(
    workers: Workers, start: Path, problems: Path, tmp_path: Path, whole: Callable
) -> None:
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, PPO, EVERY_STEP)))
    workers.run("failing_rl", [str(recipe), "--fail=1:3"], 2)
    first, expected = (rollouts_of(run)[0] for run in (tmp_path / "run", whole("ppo", PPO)))
    for name in ("position", "sample", "token_ids", "rewards"):
        assert [row[name] for row in first] == [row[name] for row in expected]


def test_an_engine_that_fails_again_and_again_ends_the_run(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run"))
    with pytest.raises(AssertionError, match=r"failed 3 times in a row \(out of memory\): the same command continues"):
        workers.run("failing_rl", [str(recipe), "--fail=0:1:always"], 1)
    assert not rollouts_of(tmp_path / "run")


def test_the_log_has_what_the_model_says_of_its_rollouts(
    workers: Workers, start: Path, problems: Path, whole: Callable
) -> None:
    """Log-probabilities and REPRO's losses are those of transformers, which reads the exported start."""
    from transformers import AutoModelForCausalLM

    run = whole("ppo", PPO)
    model = AutoModelForCausalLM.from_pretrained(run / "engine").eval()
    first = rollouts_of(run)[0]
    assert len(first) == 32 and [row["position"] for row in first] == [b // 8 for b in range(32)]
    num_cut = 0

    @torch.no_grad()
    def log_probs(context: list[int], continuation: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])[:, 0]

    for row in first[::3]:
        expected = log_probs(row["prompt_ids"], row["token_ids"])
        for found in (row["columns"]["old"], row["log_probabilities"]):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
        assert row["columns"]["value"] == [0.0] * len(expected), "the value head begins with zeros"
        answer, close = [4 + NUMBERS.index(row["answer"])], [2]
        for cut, loss in zip(row["cuts"], row["answer_losses"], strict=True):
            has_closed = row["token_ids"][:cut].count(2) > 0
            context = row["prompt_ids"] + row["token_ids"][:cut] + ([] if has_closed else close)
            assert loss == pytest.approx(-float(log_probs(context, answer)), abs=1e-4)
            num_cut += 1
    assert num_cut > len(first[::3]), "some rollouts have thinking"
    assert {row["weight_version"] for row in first} == {0}
    assert {row["weight_version"] for row in rollouts_of(run)[1]} == {2}


TREE_LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, LAYOUTS["tp2"][1]),
    "pp2": (2, LAYOUTS["pp2"][1]),
    "dp2": (2, {"training": {"micro_batch_size": 2}}),
}


@pytest.mark.parametrize(
    "layout", ["one", *(pytest.param(name, marks=pytest.mark.slow(minutes=1)) for name in ("tp2", "pp2", "dp2"))]
)
def test_what_sequences_share_is_computed_once_with_the_same_result(
    layout: str, workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    num_processes, changes = TREE_LAYOUTS[layout]
    recipe = rl_recipe(start, problems, tmp_path / "run", **merged(THINKING, changes))
    workers.run("scored_trees", [str(write_recipe(recipe))], num_processes)
    for rank in range(num_processes):
        scores = torch.load(tmp_path / f"run.scores-{rank}.pt")
        assert scores["apart"].abs().sum() > 100
        torch.testing.assert_close(scores["together"], scores["apart"], rtol=0, atol=1e-5)


def test_an_iteration_reports_rewards_and_the_mismatch(whole: Callable) -> None:
    run = whole("ppo", PPO)
    rows = [row for row in read_metrics(run) if "reward" in row]
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        total = sum(value for name, value in row.items() if name.startswith("reward/"))
        assert row["reward"] == pytest.approx(total)
        assert 0 < row["mismatch/gap_max"] < 1e-4 and 0 < row["mismatch/probe_gap_max"] < 1e-4
        assert sum(row[f"groups/{kind}"] for kind in ("right", "wrong", "mixed")) == pytest.approx(1)
        assert row["repro/L_first"] > 0 and row["repro/segments"] > 0
        assert row["seconds/iteration"] > row["seconds/generation"] > 0


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "reinforce_plus_plus": {},
    "ppo": {"critic": {"learning_rate": 1e-2}},
}


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("task", ["bandit", "successors"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_reaches_the_optimum(algorithm: str, task: str, workers: Workers, start: Path, tmp_path: Path) -> None:
    """From random weights. A prompt whose rollouts all are wrong teaches nothing: there the entropy keeps it trying."""
    problems = make_problems(tmp_path / "problems.jsonl", NUMBERS if task == "successors" else NUMBERS[3:4])
    num_iterations = 40 if task == "successors" else 20
    changes = merged(
        ALGORITHMS[algorithm],
        {
            "algorithm": {"name": algorithm, "entropy_coefficient": 0.01},
            "training": {"num_steps": 2 * num_iterations, "global_batch_size": 128, "micro_batch_size": 8},
            "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
            "rollouts": {"num_prompts": 8, "num_samples": 32, "max_num_seqs": 256},
            "checkpoint": {"save_interval": 0},
        },
    )
    recipe = rl_recipe(start, problems, tmp_path / "run", **changes)
    workers.run(PROGRAM, [str(write_recipe(recipe))], 1)
    accuracies = [row["accuracy"] for row in read_metrics(tmp_path / "run") if "accuracy" in row]
    assert accuracies[0] < 0.4 and min(accuracies[-2:]) > 0.95, accuracies


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize(("num_processes", "program"), [(1, PROGRAM), (2, PROGRAM), (1, "failing_rl")])
def test_vllm_in_this_process_follows_the_trainer(
    num_processes: int, program: str, workers: Workers, problems: Path, tmp_path: Path
) -> None:
    """With tied embeddings, whose copy vLLM must renew; every iteration compares engine and trainer. Also where vLLM
    fails in the second wave and is opened again."""
    start = make_start(tmp_path / "tied", tied=True)
    changes = merged(THINKING, {"rollouts": {"engine": "vllm"}, "repro": {"enabled": False}})
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **changes))
    options = ["--fail=0:3"] if program == "failing_rl" else []
    workers.run(program, [str(recipe), *options], num_processes)
    rows = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert len(rows) == 2 and all(0 < row["mismatch/gap_max"] < 1e-4 for row in rows)


def test_dynamic_sampling_trains_on_groups_that_differ(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    changes = {"rollouts": {"dynamic_sampling": True, "max_waves": 40, "num_samples": 16, "num_prompts": 2}}
    recipe = write_recipe(rl_recipe(start, problems, tmp_path / "run", **changes))
    workers.run(PROGRAM, [str(recipe)], 1)
    positions = []
    for iteration in rollouts_of(tmp_path / "run"):
        used = {row["position"] for row in iteration if row["is_used"]}
        assert len(used) == 2
        for position in {row["position"] for row in iteration}:
            rewards = {row["rewards"]["correct"] for row in iteration if row["position"] == position}
            assert (len(rewards) > 1) == (position in used)
        positions += sorted({row["position"] for row in iteration})
    assert positions == list(range(len(positions))), "every prompt is sampled once, iteration after iteration"


@pytest.mark.slow(minutes=1)
def test_a_reference_of_steps_that_are_repeated_replaces_the_later_ones(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    changes = {"algorithm": {"kl": "reward", "reference_refresh": 1}, "training": {"num_steps": 8}}
    path = write_recipe(rl_recipe(start, problems, tmp_path / "run", **merged(changes)))
    workers.run(PROGRAM, [str(path)], 1)
    shutil.rmtree(tmp_path / "run/checkpoints")  # its references are of steps 2, 4 and 6, of which two are kept
    workers.run(PROGRAM, [str(path)], 1)
    names = sorted(one.name for one in (tmp_path / "run/reference").glob("step_*"))
    assert names == ["step_00000004", "step_00000006"]


@pytest.mark.slow(minutes=1)
def test_rollouts_that_lack_what_another_algorithm_needs_are_refused(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    """Within an iteration; another one that begins is sampled and scored anew."""
    recipe = rl_recipe(start, problems, tmp_path / "run", **merged(EVERY_STEP, {"training": {"num_steps": 2}}))
    workers.run(PROGRAM, [str(write_recipe(recipe))], 1)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000002")
    penalized = write_recipe(recipe | {"algorithm": {"kl": "loss"}})
    with pytest.raises(AssertionError, match=r"were scored without reference, which .*=grpo with kl=loss needs"):
        workers.run(PROGRAM, [str(penalized)], 1)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000001")
    workers.run(PROGRAM, [str(penalized)], 1)
    assert all("reference" in row["columns"] for row in rollouts_of(tmp_path / "run")[0])


@pytest.mark.slow(minutes=1)
def test_the_log_names_the_recipe_of_the_current_iteration(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    """Also where the recipe changed within an iteration, which is still of the recipe before."""
    recipe = rl_recipe(start, problems, tmp_path / "run", **merged(EVERY_STEP, {"training": {"num_steps": 2}}))
    workers.run(PROGRAM, [str(write_recipe(recipe))], 1)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000002")
    changed = merged(recipe, {"rollouts": {"temperature": 0.5}, "training": {"num_steps": 4}})
    workers.run(PROGRAM, [str(write_recipe(changed))], 1)
    assert read_yaml(tmp_path / "run/rollouts/recipe.yaml")["rollouts"]["temperature"] == 0.5


def test_a_refreshed_reference_is_the_policy_of_that_iteration(
    workers: Workers, start: Path, problems: Path, tmp_path: Path
) -> None:
    """Also for a run that resumes in between, from the weights on the disk."""
    changes = {"algorithm": {"kl": "reward", "kl_estimator": "k1", "reference_refresh": 2}}
    recipe = rl_recipe(start, problems, tmp_path / "run", **merged(changes, {"training": {"num_steps": 8}}))
    path = write_recipe(recipe)
    is_due = has_step(5)
    workers.run_and_kill(PROGRAM, [str(path)], lambda: is_due(tmp_path / "run"))
    workers.run(PROGRAM, [str(path)], 1)
    divergences = [row["reference_kl"] for row in read_metrics(tmp_path / "run") if "reference_kl" in row]
    assert [value == pytest.approx(0, abs=1e-6) for value in divergences] == [True, False, True, False]
