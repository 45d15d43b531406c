"""The long table: rows of files, in the order of the levels that a step takes at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.studies.expand import expand
from megatron_tpt.studies.folders import DONE, SPEC, place
from megatron_tpt.studies.pages import write_study_report
from megatron_tpt.studies.study import load_study
from megatron_tpt.studies.table import collect

EVIL = "<img src=x onerror=alert(1)> [click](javascript:alert(1)) | $x$ \x1b]0;P\x07 \u202e"


def finished(folder: Path, factors: dict[str, Any], steps: dict[str, Any], content: object, **more: Any) -> Any:
    """The configuration, the graph, and OUTPUT of a study whose steps have run and left `content`."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "T", "factors": factors, "steps": steps} | more, sort_keys=False))
    config = load_study(path)
    graph = expand(config)
    place(graph, folder / "runs", "present")
    for node in graph.nodes.values():
        write_json(node.folder / SPEC, {})
        node.output.mkdir()
        (node.output / "results.json").write_text(json.dumps(content))
        write_json(node.folder / DONE, {"hours": 1.0})
    return config, graph, folder / "runs"


def test_rows_of_a_file_carry_factors_of_their_own(tmp_path: Path) -> None:
    results = {"metrics": {"accuracy": "a", "length": "tokens.0"}, "rows": "points", "factors": ["arm"]}
    results["trials"] = {"accuracy": "n"}
    content = {"points": [{"arm": "x", "a": 0.5, "n": 10, "tokens": [3]}, {"arm": "y", "a": 1, "n": 10, "tokens": [4]}]}
    _, graph, _ = finished(tmp_path, {"seed": [0]}, {"s": {"command": ["{seed}"], "results": results}}, content)
    rows, missing = collect(graph)
    assert [(row.levels, row.metric, row.value, row.trials) for row in rows] == [
        ({"seed": "0", "arm": "x"}, "accuracy", 0.5, 10), ({"seed": "0", "arm": "x"}, "length", 3.0, None),
        ({"seed": "0", "arm": "y"}, "accuracy", 1.0, 10), ({"seed": "0", "arm": "y"}, "length", 4.0, None),
    ]  # fmt: skip
    assert missing == []


def test_rows_belong_to_the_levels_that_a_step_takes_at_once(tmp_path: Path) -> None:
    steps = {
        "train": {"command": ["{arm}", "{seed}"]},
        "test": {
            "command": ["{train}", "{seed}"],
            "over": ["arm"],
            "results": {"metrics": {"m": "m"}, "rows": "models"},
        },
    }
    factors = {"arm": ["a", "b"], "seed": [0, 1]}
    _, graph, _ = finished(tmp_path, factors, steps, {"models": [{"m": 1}, {"m": 2}]})
    rows, _ = collect(graph)
    assert {(row.levels["arm"], row.levels["seed"], row.value) for row in rows} == {
        ("a", "0", 1.0), ("a", "1", 1.0), ("b", "0", 2.0), ("b", "1", 2.0)
    }  # fmt: skip
    (tmp_path / "other").mkdir()
    _, graph, _ = finished(tmp_path / "other", factors, steps, {"models": [{"m": 1}]})
    with pytest.raises(UserError, match="1 row, and 2 combinations of arm"):
        collect(graph)


def test_a_step_without_a_factor_gives_no_row_for_each_of_its_levels(tmp_path: Path) -> None:
    """Each would count as a measurement of its own."""
    result = {"metrics": {"m": "m"}}
    steps = {"base": {"command": ["{arm}", "{seed}"], "results": result},
             "tuned": {"command": ["{base}", "{sft}"], "results": result}}  # fmt: skip
    _, graph, _ = finished(tmp_path, {"arm": ["a"], "sft": ["s", "t"], "seed": [0]}, steps, {"m": 1})
    rows, _ = collect(graph)
    assert [(row.levels["arm"], row.levels["sft"]) for row in rows] == [("a", ""), ("a", "s"), ("a", "t")]


@pytest.mark.parametrize(
    ("results", "content", "message"),
    [
        ({"metrics": {"m": "m"}}, {"n": 1}, "has nothing at m"),
        ({"metrics": {"m": "m"}}, {"m": "high"}, "m is 'high', and a number is due"),
        ({"metrics": {"m": "m"}}, {"m": float("nan")}, "a number is due"),
        ({"metrics": {"m": "m"}, "trials": {"m": "n"}}, {"m": 3, "n": 10}, "m is 3 of 10 problems, and no share"),
        ({"metrics": {"m": "m"}, "rows": "r"}, {"r": 1}, "r is no list of rows"),
        ({"metrics": {"m": "m"}, "rows": "r", "factors": ["f"]}, {"r": [{"m": 1, "f": [1]}]}, "a level is due"),
        ({"metrics": {"m": "m"}, "file": "other.json"}, {}, "no results there"),
    ],
)
def test_a_file_without_what_the_study_says_is_refused(
    tmp_path: Path, results: dict[str, Any], content: object, message: str
) -> None:
    _, graph, _ = finished(tmp_path, {"seed": [0]}, {"s": {"command": ["{seed}"], "results": results}}, content)
    with pytest.raises(UserError, match=message):
        collect(graph)


def test_the_report_is_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {"metrics": {EVIL: "m"}, "rows": "r", "factors": ["arm"]}
    content = {"r": [{"arm": EVIL, "m": 1}, {"arm": "b", "m": 0.5}]}
    steps = {"s": {"command": ["{seed}"], "results": results, "cost": {"tokens": 5, "flops": 5}}}
    config, graph, output = finished(tmp_path, {"seed": [0, 1]}, steps, content, title=EVIL)
    write_study_report(config, graph, output)
    page = (output / "report/report.html").read_text()
    text = (output / "report/report.md").read_text() + capsys.readouterr().out
    assert "<img src=x" not in page and "default-src 'none'" in page and "<script" not in page
    assert "\\](javascript" in text and not any(one in text + page for one in "\x1b\x07\u202e")
    assert len(list((output / "report").glob("*.png"))) == 2
