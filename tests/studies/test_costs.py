"""What steps cost: arithmetic, recipes, and where a step's output says it."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from megatron_tpt.config.load import load_recipe
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.studies.costs import (
    Spent,
    calculate,
    check_budget,
    cost_of_result,
    costs,
    longest_chain,
    refused_recipes,
    total,
)
from megatron_tpt.studies.expand import Graph, expand
from megatron_tpt.studies.folders import DONE, SPEC, place
from megatron_tpt.studies.measured import measured
from megatron_tpt.studies.study import Budget, ResultBudget, load_study
from megatron_tpt.thinking.ledger import Entry, Ledger
from megatron_tpt.thinking.statistics import ThinkingStatistics

RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2, "vocab_size": 256},
    "training": {"num_steps": 10, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 4},
    "run": {"output_dir": "x"},
}


def graph_of(folder: Path, factors: dict[str, Any], steps: dict[str, Any]) -> Graph:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "T", "factors": factors, "steps": steps}, sort_keys=False))
    graph = expand(load_study(path))
    place(graph, folder / "runs", "present")
    return graph


def test_arithmetic_is_calculated_and_nothing_else() -> None:
    assert calculate("2 * 1.5e3 * tokens ** 2 / (4 - 1) + -1", tokens=2.0) == 3999.0
    for text in (
        "__import__('os')",
        "tokens",
        "1 / 0",
        "x.y",
        "'a' * 5",
        "1 if 1 else 2",
        "9**9**9**9",
        "(" * 5000,
        "",
        "true",
    ):
        with pytest.raises(UserError, match="cannot be calculated"):
            calculate(text, tokens=None)
    with pytest.raises(UserError, match=r"^'5 \*' cannot be calculated \(invalid syntax\)$"):
        calculate("5 *")


def test_a_negative_cost_is_refused(tmp_path: Path) -> None:
    steps = {"s": {"command": ["x"], "cost": {"tokens": "5 - 6"}}}
    with pytest.raises(UserError, match=r"steps.s.cost: tokens, FLOPs or hours are negative"):
        costs(graph_of(tmp_path, {"seed": [0]}, steps))


def test_a_budget_of_no_result_is_refused(tmp_path: Path) -> None:
    steps = {"s": {"command": ["{a}"], "results": {"metrics": {"m": "m"}}}}
    graph = graph_of(tmp_path, {"a": [1], "b": [1]}, steps)
    budget = Budget(results=[ResultBudget(tokens=1), ResultBudget({"b": ["1"]}, tokens=1)])
    with pytest.raises(UserError, match=r"budget.results.1: no result has these levels"):
        check_budget(graph, budget, dict.fromkeys(graph.nodes, Spent(1, 0, 1, 1)))


def test_what_is_not_known_stays_unknown() -> None:
    assert total([Spent(1, 2, 3, 4), Spent(1, 0, None, 1)]) == Spent(2, 2, None, 5)
    assert Spent(1, 2, None, 4).times(0.5) == Spent(0.5, 1, None, 2) and Spent(1, 2).all_tokens == 3


def test_a_training_step_costs_what_its_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["-m", "megatron_tpt.pretrain", str(tmp_path / "recipe.yaml"), "--training.num_steps={steps}",
               "--training.init_from={import}/not-there-yet"]  # fmt: skip
    graph = graph_of(tmp_path, {"steps": [10, 20]}, {"import": {"command": ["-c", ""]}, "train": {"command": command}})
    found = {node.name: costs(graph)[key] for key, node in graph.nodes.items()}
    recipe, _ = load_recipe(PretrainRecipe, [str(tmp_path / "recipe.yaml")])
    per_token = model_flops_per_token(recipe.model, 32)
    assert found["train 10"] == Spent(1280.0, 0.0, 1280 * per_token, None)
    assert found["train 20"].tokens == 2560 and found["train 20"].flops == pytest.approx(2560 * per_token)
    assert found["import"] == Spent(0.0, 0.0, 0.0, None)


def test_a_recipe_that_training_would_refuse_is_told_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["-m", "megatron_tpt.pretrain", str(tmp_path / "recipe.yaml"), "--{option}"]
    graph = graph_of(
        tmp_path,
        {"option": ["training.num_stps=1", "training.num_steps=1"]},
        {"import": {"command": ["-c", ""]}, "train": {"command": [*command, "--training.init_from={import}/later"]}},
    )
    [(name, reason)] = refused_recipes(graph).items()
    assert name == "train training.num_stps=1" and "num_stps: unknown; did you mean num_steps?" in reason
    assert [costs(graph)[key].tokens for key, node in graph.nodes.items() if node.step == "train"] == [None, 128]


def test_the_vocabulary_of_data_that_is_not_there_is_not_guessed(tmp_path: Path) -> None:
    recipe = RECIPE | {"model": {**RECIPE["model"]}}
    del recipe["model"]["vocab_size"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps = {"train": {"command": ["-m", "megatron_tpt.pretrain", str(tmp_path / "recipe.yaml")]}}
    [spent] = costs(graph_of(tmp_path, {"seed": [0]}, steps)).values()
    assert spent.tokens == 1280 and spent.flops is None


def test_a_finished_training_run_says_what_it_took(tmp_path: Path) -> None:
    run = tmp_path / "output/run"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    (run / "metrics.jsonl").write_text('{"step": 5, "tokens": 640}\n{"step": 5, "validation_loss": 1}\n'
                                       '{"step": 10, "tokens": 1280}\n')  # fmt: skip
    recipe, _ = load_recipe(PretrainRecipe, [str(run / "run.yaml")])
    command = ["-m", "megatron_tpt.pretrain", "recipe.yaml", f"--run.output_dir={run}"]
    found = measured(command, tmp_path / "output", None)
    assert found == {"tokens": 1280, "flops": pytest.approx(1280 * model_flops_per_token(recipe.model, 32))}
    (run / "metrics.jsonl").write_text("")
    assert measured(command, tmp_path / "output", None) == {}
    (tmp_path / "output/s.json").write_text(json.dumps({"thinking": [{"total": 77}]}))
    assert measured(["x"], tmp_path / "output", "s.json:thinking.0.total") == {"tokens": 77}
    with pytest.raises(UserError, match=r"s.json: has nothing at thinking.1"):
        measured(["x"], tmp_path / "output", "s.json:thinking.1")


def test_reinforcement_learning_costs_rollouts_too(tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "output/run"
    for folder in (start, run):
        folder.mkdir(parents=True)
    (start / "recipe.yaml").write_text(yaml.safe_dump({"model": RECIPE["model"]}))
    content = {
        "training": {"init_from": str(start), "num_steps": 4, "sequence_length": 32, "global_batch_size": 8,
                     "micro_batch_size": 1},
        "rollouts": {"num_prompts": 4, "num_samples": 4, "max_new_tokens": 10}, "data": {"train": ["prompts.jsonl"]},
    }  # fmt: skip
    for path in (run / "run.yaml", tmp_path / "rl.yaml"):
        path.write_text(yaml.safe_dump(content))
    recipe, _ = load_recipe(RLRecipe, [str(tmp_path / "rl.yaml")])
    of_token = model_flops_per_token(recipe.model, 32)
    steps = {"train": {"command": ["-m", "megatron_tpt.rl", str(tmp_path / "rl.yaml")]}}
    [spent] = costs(graph_of(tmp_path, {"seed": [0]}, steps)).values()
    assert (spent.tokens, spent.generated) == (4 * 8 * 32, 2 * 16 * 10)
    assert spent.flops == pytest.approx((4 * 8 * 32 + 320 / 3) * of_token)
    rows = [{"step": 1, "rollouts": 16, "response_tokens": 5.0}, {"step": 1, "tokens": 100},
            {"step": 3, "rollouts": 20, "response_tokens": 4.5}, {"step": 3, "tokens": 300}]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = measured(["-m", "megatron_tpt.rl", "rl.yaml", f"--run.output_dir={run}"], tmp_path / "output", None)
    assert found == {"tokens": 300, "generated_tokens": 170, "flops": pytest.approx((300 + 170 / 3) * of_token)}
    graph = graph_of(tmp_path, {"seed": [0]}, steps)
    [node] = graph.nodes.values()
    write_json(node.folder / SPEC, {})
    write_json(node.folder / DONE, {"hours": 1, **found})
    [spent] = costs(graph).values()
    assert (spent.tokens, spent.generated, spent.all_tokens) == (300, 170, 470)


def test_a_thinking_job_says_what_it_read_and_wrote(tmp_path: Path) -> None:
    steps = {"think": {"command": ["t", "{seed}", "{output}"],
                       "cost": {"flops": "10 * (tokens + prompt_tokens)", "tokens": 1, "generated": True}}}  # fmt: skip
    graph = graph_of(tmp_path, {"seed": [0]}, steps)
    with pytest.raises(UserError, match=r"steps.think.cost: '10 .* cannot be calculated"):
        costs(graph)  # nothing is known of the prompts yet
    [node] = graph.nodes.values()
    ledger = Ledger(node.output / ".work/ledger", 0, 0)
    for block in ("a", "b"):
        counted = ThinkingStatistics(records=1, prompt_tokens=100)
        counted.thinking_tokens.add(7)
        ledger.add(Entry(block, 1, numpy.zeros(0, numpy.uint64), counted))
    found = measured(["t"], node.output, None)
    write_json(node.folder / SPEC, {})
    write_json(node.folder / DONE, {"hours": 1, **found})
    assert list(costs(graph).values()) == [Spent(0.0, 14, 2140, 1)]


def test_a_result_takes_what_all_steps_before_it_took_each_once_and_only_its_share(tmp_path: Path) -> None:
    steps = {
        "think": {"command": ["k", "{seed}"], "cost": {"tokens": 50, "flops": "2 * tokens", "generated": True}},
        "train": {"command": ["t", "{think}", "{seed}"], "cost": {"tokens": 1000, "flops": "6 * tokens", "hours": 2}},
        "tune": {"command": ["f", "{train}", "{think}", "{at.step}"], "cost": {"tokens": 10, "flops": 60, "hours": 1},
                 "results": {"metrics": {"m": "m"}, "shares": {"train": "{at.step} / 100"}}},
    }  # fmt: skip
    graph = graph_of(tmp_path, {"at": {"early": {"step": 25}, "late": {"step": 100}}, "seed": [0]}, steps)
    early, late = [cost_of_result(wanted, costs(graph)) for wanted in graph.results]
    assert early == Spent(250 + 10, 50, 100 + 1500 + 60, None) and late.all_tokens == 1060
    assert longest_chain(graph, costs(graph)) is None  # nothing is said of the hours of thinking


def test_of_a_step_over_several_combinations_each_takes_what_it_needs(tmp_path: Path) -> None:
    steps = {
        "train": {"command": ["t", "{arm.data}"], "cost": {"tokens": "{arm.tokens}", "flops": 0, "hours": 1}},
        "test": {
            "command": ["e", "{train}"],
            "over": ["arm"],
            "cost": {"hours": 3},
            "results": {"metrics": {"m": "m"}},
        },
    }
    # Two arms of the same data share training and test: both are part of the cost of each.
    arms = {"a": {"data": "x", "tokens": 10}, "b": {"data": "x", "tokens": 10}, "c": {"data": "y", "tokens": 30}}
    graph = graph_of(tmp_path, {"arm": arms}, steps)
    spent = {wanted.levels["arm"]: cost_of_result(wanted, costs(graph)) for wanted in graph.results}
    assert spent == {name: Spent(tokens, 0, 0, 1 + 3 / 2) for name, tokens in (("a", 10), ("b", 10), ("c", 30))}


def test_finished_runs_of_a_step_say_how_long_others_take(tmp_path: Path) -> None:
    steps = {
        "load": {"command": ["-c", "", "{size}"]},
        "train": {"command": ["t", "{load}", "{size}"], "cost": {"flops": "{size} * 1e9"}},
    }
    graph = graph_of(tmp_path, {"size": [1, 3]}, steps)
    for node in graph.nodes.values():
        if node.levels["size"] == "1":
            write_json(node.folder / SPEC, {})
            write_json(node.folder / DONE, {"hours": 0.5, "tokens": None, "flops": None})
    place(graph, tmp_path / "runs", "present")
    found = {node.name: costs(graph)[key].hours for key, node in graph.nodes.items()}
    assert found == {"load 1": 0.5, "train 1": 0.5, "load 3": 0.5, "train 3": pytest.approx(1.5)}
    assert longest_chain(graph, costs(graph)) == pytest.approx(2.0)
