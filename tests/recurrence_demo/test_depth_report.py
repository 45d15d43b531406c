import json
from pathlib import Path

import arms
import pytest
from arms import MAIN_ARMS, RECURRENT, STATIC
from claims import judge_all
from house import LENGTHS
from report import write_depth_report

from megatron_tpt.studies.results import Point

SEEDS = (1, 2, 3)


def points_of(accuracies: dict[str, float], seed: int) -> list[Point]:
    """With a little noise, other for every seed and arm."""
    noise = 0.004
    return [
        Point(arm, 1000, min(1.0, value + noise * ((seed * 7 + place * 3) % 5 - 2)), 400, seed)
        for place, (arm, value) in enumerate(accuracies.items())
    ]


def accuracies(r1: float, r2: float, r4: float, r8: float, static: float) -> dict[str, float]:
    labels = [RECURRENT.label(depth) for depth in (1, 2, 4, 8)]
    return dict(zip([*labels, STATIC.name], (r1, r2, r4, r8, static), strict=True))


def verdicts(*values: float, seeds: tuple[int, ...] = SEEDS) -> list[str]:
    return [one.verdict for one in judge_all([p for seed in seeds for p in points_of(accuracies(*values), seed)])]


def test_the_figures_decide_whether_a_claim_holds() -> None:
    assert verdicts(0.3, 0.5, 0.95, 0.95, 0.5) == ["holds"] * 4
    # r = 2 hardly above r = 1; r = 4 below r = 2; r = 8 far above r = 4; static above.
    assert verdicts(0.45, 0.5, 0.4, 0.7, 0.9) == ["does not hold"] * 4


def test_an_interval_on_both_sides_of_a_limit_decides_nothing() -> None:
    points = [Point(RECURRENT.label(depth), 1000, 0.5 + depth * sign / 100, 400, seed)
              for seed, sign in ((1, 1), (2, -1)) for depth in (2, 4)]  # fmt: skip
    assert [one.verdict for one in judge_all(points)] == ["not decided"]


def test_claims_about_arms_that_were_not_run_are_omitted() -> None:
    assert len(verdicts(0.3, 0.5, 0.9, 0.9, 0.5, seeds=(0,))) == 4


def write_results(path: Path, values: dict[str, float], seed: int) -> Path:
    points = points_of(values, seed)
    runs = [{"arm": arm.name, "steps": 10, "tokens": 1000, "flops": 1e12, "seconds": 1.0} for arm in MAIN_ARMS]
    by_doors = {point.arm: {str(doors): point.accuracy for doors in LENGTHS} for point in points}
    content = {"points": [vars(point) for point in points], "runs": runs, "by_doors": by_doors}
    path.write_text(json.dumps(content))
    return path


def test_the_report_says_what_does_not_hold(tmp_path: Path) -> None:
    values = accuracies(0.3, 0.5, 0.9, 0.9, 0.99)
    paths = [write_results(tmp_path / f"{seed}.json", values, seed) for seed in SEEDS]
    write_depth_report(tmp_path, paths)
    page = (tmp_path / "report.md").read_text()
    assert "- does not hold: r = 8 is better than the static model at equal tokens (-" in page
    assert "- holds: r = 4 is better than r = 2 (+" in page and "Seeds: 1, 2, 3." in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert [one["num_seeds"] for one in content["summaries"]] == [3] * 5
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_steps", [32, 320, 611])
def test_walks_become_longer_until_half_of_the_steps(num_steps: int) -> None:
    stages = arms.stages(num_steps)
    assert list(stages) == list(LENGTHS) and list(stages.values())[-1] == num_steps
    assert sorted(set(stages.values())) == list(stages.values())
    assert stages[LENGTHS[-2]] == pytest.approx(num_steps / 2, abs=1)
