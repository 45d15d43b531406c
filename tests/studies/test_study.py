"""The file of a study: the graph that its factors expand to, and mistakes in it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tpt.errors import UserError
from megatron_tpt.studies.expand import Graph, expand
from megatron_tpt.studies.study import load_study


def graph_of(folder: Path, factors: dict[str, Any], steps: dict[str, Any], **more: Any) -> Graph:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "T", "factors": factors, "steps": steps} | more, sort_keys=False))
    return expand(load_study(path))


def commands(graph: Graph) -> dict[str, list[str]]:
    """Of every node by its name; folders are written as the name of their step."""
    names = {node.key: node.step for node in graph.nodes.values()}
    found = {}
    for node in graph.nodes.values():
        words = node.words
        for key, name in names.items():
            words = [word.replace(f"\0{key}\0", f"<{name}>") for word in words]
        found[node.name] = words
    return found


def test_a_step_depends_only_on_what_it_and_the_steps_before_it_mention(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        {
            "arm": {
                "plain": {"data": "{texts}/a", "options": ["--x", 1]},
                "thought": {"data": "{think}", "options": []},
            },
            "at": {"early": {"step": 10}, "late": {"step": 20}},
            "seed": [0, 1],
        },
        {
            "texts": {"command": ["t.py", "{output}"]},
            "think": {"command": ["k.py", "{texts}", "--seed={seed}"]},
            "train": {"command": ["n.py", "--data=[{path: {arm.data}}]", "{arm.options}", "{seed}", "{{seed}}"]},
            "test": {"command": ["e.py", "{train}/step_{at.step}"], "results": {"metrics": {"accuracy": "a"}}},
        },
    )
    found = commands(graph)
    assert next(iter(found)) == "texts" and len(found) == 1 + 2 + 4 + 8
    assert found["train plain, 1"] == ["n.py", "--data=[{path: <texts>/a}]", "--x", "1", "1", "{seed}"]
    assert found["train thought, 0"] == ["n.py", "--data=[{path: <think>}]", "0", "{seed}"]
    assert found["test thought, early, 1"] == ["e.py", "<train>/step_10"]
    assert found["think 1"] == ["k.py", "<texts>", "--seed=1"]


def test_arms_of_the_same_content_are_one_step(tmp_path: Path) -> None:
    factors = {"arm": {"a": {"size": 5}, "b": {"size": 5}, "c": {"size": 6}}}
    graph = graph_of(tmp_path, factors, {"run": {"command": ["{arm.size}"], "results": {"metrics": {"m": "m"}}}})
    assert len(graph.nodes) == 2 and [wanted.levels["arm"] for wanted in graph.results] == ["a", "b", "c"]


def test_a_step_over_a_factor_takes_all_levels_at_once(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        {"arm": ["a", "b"], "size": [1, 2], "seed": [0, 1]},
        {
            "train": {"command": ["{arm}", "{size}", "{seed}"]},
            "test": {
                "command": ["--models", "{train}/model", "--seed", "{seed}"], "over": ["arm", "size"],
                "results": {"metrics": {"m": "m"}, "rows": "models"},
            },
        },
        exclude=[{"arm": "b", "size": 2}],
    )  # fmt: skip
    assert commands(graph)["test 1"] == ["--models", *["<train>/model"] * 3, "--seed", "1"]
    [node] = [node for node in graph.nodes.values() if node.name == "test 1"]
    assert [(one["arm"], one["size"]) for [one] in node.rows_of] == [("a", "1"), ("a", "2"), ("b", "1")]
    assert len(graph.results) == 6


def test_a_step_over_a_factor_takes_what_is_the_same_for_two_levels_once(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        {"arm": {"a": {"data": "x"}, "b": {"data": "y"}, "c": {"data": "x"}}},
        {
            "train": {"command": ["{arm.data}"]},
            "test": {"command": ["{train}"], "over": ["arm"], "results": {"metrics": {"m": "m"}, "rows": "models"}},
        },
    )
    assert commands(graph)["test"] == ["<train>", "<train>"]
    [node] = [node for node in graph.nodes.values() if node.step == "test"]
    assert [[one["arm"] for one in row] for row in node.rows_of] == [["a", "c"], ["b"]]
    assert [(wanted.levels["arm"], wanted.before[0].name) for wanted in graph.results] == [
        ("a", "train a"), ("b", "train b"), ("c", "train a")
    ]  # fmt: skip


def test_results_are_wanted_only_of_some_levels_and_combinations(tmp_path: Path) -> None:
    steps = {
        "base": {"command": ["{data}", "{seed}"], "results": {"metrics": {"m": "m"}}},
        "rl": {"command": ["{base}", "{sft}"], "only": {"sft": ["long"]}, "results": {"metrics": {"m": "m"}}},
    }
    factors = {"data": ["a", "b"], "sft": ["short", "long"], "seed": [0, 1]}
    graph = graph_of(tmp_path, factors, steps, exclude=[{"data": "b", "sft": "long"}])
    assert [wanted.node.name for wanted in graph.results] == [
        "base a, 0", "base a, 1", "rl a, long, 0", "rl a, long, 1", "base b, 0", "base b, 1",
    ]  # fmt: skip


def test_the_key_ignores_where_and_with_which_resources_a_step_runs(tmp_path: Path) -> None:
    step: dict[str, Any] = {"command": ["a.py", "{seed}"]}
    keys = [
        [*graph_of(tmp_path, {"seed": [0]}, {"run": step | more}).nodes]
        for more in ({}, {"scale": {"gpus_per_task": 8}, "launcher": ["srun"]}, {"version": 2})
    ]
    assert keys[0] == keys[1] != keys[2]


RESULT = {"metrics": {"m": "m"}}


@pytest.mark.parametrize(
    ("factors", "steps", "more", "message"),
    [
        ({"a": [1]}, {"a": {"command": ["x"]}}, {}, "a: is a factor and a step"),
        ({"output": [1]}, {"a": {"command": ["x"]}}, {}, "output: a name of a factor"),
        ({True: [1]}, {"a": {"command": ["x"]}}, {}, "True: YAML reads on, off, yes and no as truth values"),
        ({"value": [1]}, {"a": {"command": ["x"]}}, {}, "value: is a column of the report"),
        ({"a": [1]}, {"s": {"command": ["x"], "results": RESULT | {"factors": ["n"]}}}, {}, "n: is a column"),
        ({"a": [1]}, {"s": {"command": ["x"]}, "t": {"command": ["{s}"], "inputs": ["{s}/x"]}}, {},
         r"inputs: \{...\}/x"),
        ({"a": 5}, {"s": {"command": ["{a}"]}}, {}, "factors.a: give a list of levels"),
        ({"a": {"1": 5, 1: 6}}, {"s": {"command": ["{a}"]}}, {}, "factors.a.1 is there twice"),
        ({"a": []}, {"s": {"command": ["{a}"]}}, {}, "factors.a: give a list of levels"),
        ({c: [*range(100)] for c in "abcd"}, {"s": {"command": ["x"]}}, {}, "more than 1,000,000 combinations"),
        ({"a": [1]}, {"s": {"command": ["{b}"]}}, {}, r"steps.s: \{b\} means nothing; known are a, s, output"),
        ({"a": {"x": {"y": 1}}}, {"s": {"command": ["{a.z}"]}}, {}, r"\{a.z\}: the level x of a holds no z"),
        ({"a": {"x": {"y": [[1]]}}}, {"s": {"command": ["{a.y}"]}}, {}, "neither a text nor a number"),
        ({"a": {"x": {"y": "{a.y}"}}}, {"s": {"command": ["{a.y}"]}}, {}, "lead back to themselves"),
        ({"a": [1]}, {"s": {"command": ["{t}"]}, "t": {"command": ["{s}"]}, "u": {"command": ["{s}"]}}, {},
         r"steps.s: needs its own output \(u -> s -> t -> s\)"),
        ({"a": [1]}, {"s": {"command": ["{t}"]}, "t": {"command": ["{s}"]}}, {}, r"own output \(s -> t -> s\)"),
        ({"a": [1]}, {"s": {"command": ["x"], "over": ["b"]}}, {}, "steps.s.over: there is no factor b"),
        ({"a": [1]}, {"s": {"command": ["x"], "over": ["a"]}}, {}, "steps.s.over: no word of the command mentions a"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "only": {"a": ["2"]}}}, {}, "a has no level 2; known are 1"),
        ({"a": [1]}, {"s": {"command": ["{a}"]}}, {"exclude": [{"a": 2}]}, "exclude: a has no level 2"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT | {"shares": {"t": 1}}}}, {},
         "steps.s.results.shares: t is no step before it"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT | {"trials": {"n": "n"}}}}, {},
         "steps.s.results.trials: there is no metric n; known are m"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT}}, {"report": {"chance": {"n": 1}}},
         "report.chance: there is no metric n"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT}}, {"report": {"replicate": "sead"}},
         "report.replicate: there is no factor sead; known are a"),
        ({"a": ["x"]}, {"s": {"command": ["{a}"], "results": RESULT}}, {"report": {"x": "a"}},
         "report.x: the level 'x' of a is no number"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT}}, {"report": {"baseline": {"b": "1"}}},
         "report.baseline: there is no factor b"),
        *[({"a": [1]}, {"s": {"command": ["{a}"], "results": {"metrics": dict.fromkeys(metrics, "m")}}},
           {"report": {"claims": [{"text": "t", "of": {"a": "1"}, "minus": {"a": "1"}, **claim}]}}, message)
          for metrics, claim, message in [
              ("m", {"of": {"a": ["1", "2"]}}, "report.claims.0.of: a has no level 2; known are 1"),
              ("m", {"minus": {"seed": "0"}}, "report.claims.0.minus: seed is report.replicate"),
              ("m", {"metric": "n"}, "report.claims.0.metric: there is no metric n; known are m"),
              ("mn", {}, "report.claims.0.metric: give one of m, n"),
              ("m", {"above": 0.1, "below": 0.1}, "above is 0.1, below 0.1: no difference is between"),
              ("m", {"minus": {}}, "report.claims.0.minus: names no factor"),
              ("m", {"minus": {"b": "1"}}, "report.claims.0.minus: there is no factor b; known are a"),
          ]],
        *[({"a": [1]}, {"s": {"command": ["{a}"]}}, {"report": report}, f"report.{name}: no step has results")
          for name, report in {"chance": {"chance": {"m": 0.5}},
                               "claims": {"claims": [{"text": "t", "of": {"a": 1}, "minus": {"a": 1}}]}}.items()],
        ({"a": [1]}, {"s": {"command": ["{a}"]}}, {"exclude": [{}]}, "exclude: one is empty"),
        ({"a": [1]}, {"s": {"command": ["{a}"]}}, {"exclude": [{"a": "1"}]}, "exclude: no combination of levels"),
        ({"a": [1], "b": [1, 2]}, {"s": {"command": ["{a}"]}}, {}, "factors.b: no step mentions it"),
        ({"a": [1, ""]}, {"s": {"command": ["{a}"]}}, {}, "factors.a: a level has no name"),
        ({"a": [1]}, {"s": {"command": ["x"], "over": ["a", "a"]}}, {}, "steps.s.over: a factor is there twice"),
        ({"a": [1]}, {"s": {"command": ["x"], "outputs": ["/x"]}}, {}, "steps.s.outputs: /x: give paths within"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": {"metrics": {}}}}, {}, "results.metrics: give at least one"),
        ({"a": [1]}, {"s": {"command": ["{a}"], "results": RESULT | {"factors": ["a"]}}}, {},
         "steps.s.results.factors: a is a factor of the study"),
        ({"a": [1, 2]}, {"s": {"command": ["x"], "cost": {"tokens": "{a}"}}}, {}, "no factor of the step's command"),
        ({"a": [1]}, {"s": {"command": ["x"], "inputs": ["no/file"]}}, {}, "no/file: no such file"),
        ({"a": [1]}, {"s": {"command": ["x"], "code": ["no.py"]}}, {}, "no.py: no such file"),
        ({"a": [1]}, {"s": {"comand": ["x"]}}, {}, "study.yaml:7: steps.s.comand: unknown; known there: command"),
        ({}, {"results": {"command": ["x"], "results": RESULT | {"fils": 1}}}, {}, "fils: unknown; known there: "),
        ({"a": [1]}, {"s": {"command": ["x"]}}, {"report": {"by": 1}}, "report.by: unknown; known there: replicate"),
        ({"a": [1]}, {}, {}, "steps: give at least one"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused(
    tmp_path: Path, factors: Any, steps: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        graph_of(tmp_path, factors, steps, **more)
