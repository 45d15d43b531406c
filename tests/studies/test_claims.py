"""Claims of a study: the interval of a paired difference decides, against figures that were worked out otherwise."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_comparison import grid
from toy_study import Toy

from megatron_tpt.studies.claims import decide, judge
from megatron_tpt.studies.comparison import Comparison
from megatron_tpt.studies.study import Claim, ReportConfig


@pytest.mark.parametrize(
    ("low", "high", "above", "below", "decision"),
    [
        (0.1, 0.2, 0.0, math.inf, "holds"),
        (0.0, 0.2, 0.0, math.inf, "not decided"),
        (-0.1, 0.2, 0.0, math.inf, "not decided"),
        (-0.2, 0.0, 0.0, math.inf, "does not hold"),
        (-0.04, 0.05, -0.05, 0.05, "holds"),
        (0.04, 0.06, -0.05, 0.05, "not decided"),
        (0.06, 0.07, -0.05, 0.05, "does not hold"),
        (None, None, 0.0, math.inf, "not decided"),
    ],
)
def test_the_interval_decides(low: float | None, high: float | None, above: float, below: float, decision: str) -> None:
    assert decide(low, high, above, below) == decision


def test_a_claim_is_about_paired_differences_of_means_over_levels() -> None:
    rows, values = grid()
    claims = [
        Claim("an interaction", {"pre": "y", "sft": "t"}, {"pre": ["x", "y"], "sft": ["s", "t"]}, above=0.1),
        Claim("the reverse", {"pre": "x", "sft": "s"}, {"pre": "y"}),
        Claim("of another metric", {"pre": "y"}, {"pre": "x"}, metric="loss"),
    ]
    first, second = judge(Comparison(rows, "score", ReportConfig()), claims)
    each = values[1, 1] - values.mean(axis=(0, 1))
    interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert first.difference is not None and first.difference.num_replicates == 5
    assert (first.difference.mean, first.difference.low, first.difference.high) == pytest.approx(
        (each.mean(), interval.low, interval.high)
    )
    assert (first.verdict, second.verdict) == ("holds", "does not hold")
    assert second.difference is not None and second.difference.mean == pytest.approx(
        (values[0, 0] - values[1].mean(axis=0)).mean()
    )


def test_of_factors_that_a_claim_does_not_name_both_sides_take_the_same_levels() -> None:
    rows, values = grid()
    rows = [one for one in rows if (one.levels["pre"], one.levels["sft"]) != ("y", "t")]
    comparison = Comparison(rows, "score", ReportConfig())
    found = comparison.difference({"pre": "y"}, {"pre": "x"})
    assert found is not None and found.mean == pytest.approx((values[1, 0] - values[0, 0]).mean())
    assert comparison.difference({"pre": ["x", "y"], "sft": ["s", "t"]}, {"pre": "x", "sft": "s"}) is None


def test_nothing_is_decided_while_a_level_has_no_results() -> None:
    rows, _ = grid()
    rows = [one for one in rows if one.levels["sft"] == "s"]
    claim = Claim("y is better", {"pre": "y", "sft": ["s", "t"]}, {"pre": "x", "sft": "s"})
    [judged] = judge(Comparison(rows, "score", ReportConfig()), [claim])
    assert judged.difference is None and judged.verdict == "not decided"


def test_one_seed_decides_by_its_problems_and_only_between_two_results() -> None:
    rows, _ = grid()
    rows = [one for one in rows if one.levels["seed"] == "0"]
    comparison = Comparison(rows, "score", ReportConfig())
    [of_means] = judge(comparison, [Claim("y is better", {"pre": "y"}, {"pre": "x"})])
    assert of_means.difference is not None and of_means.difference.low is None and of_means.verdict == "not decided"


def test_the_report_says_which_claims_hold_and_is_made_again_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    toy = Toy(tmp_path)
    content = toy.content()
    content["factors"]["seed"] = [0, 1, 2]
    content["report"]["claims"] = [
        {"text": f"{one} is better than {two}", "of": {"pre": one}, "minus": {"pre": two}, "above": -2, "below": 2}
        for one, two in itertools.permutations(("plain", "thought"))
    ]
    toy.write(content)
    toy.run()
    with (toy.output / "report/claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = toy.values()
    differences = [
        np.mean([values["thought", sft, str(seed)] - values["plain", sft, str(seed)] for sft in ("short", "long")])
        for seed in range(3)
    ]
    assert [float(row["mean"]) for row in rows] == pytest.approx([-np.mean(differences), np.mean(differences)])
    assert [row["verdict"] for row in rows] == [decide(float(row["low"]), float(row["high"]), -2, 2) for row in rows]
    page = (toy.output / "report/report.md").read_text()
    assert "### claims" in page and "| thought is better than plain |" in page
    before = {path.name: path.read_bytes() for path in (toy.output / "report").iterdir()}
    toy.run(report=True)
    assert {path.name: path.read_bytes() for path in (toy.output / "report").iterdir()} == before
