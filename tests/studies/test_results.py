import json
from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.studies.report import markdown, write_report
from megatron_tpt.studies.results import Point, difference, read_points, summarize, t_interval, wilson_interval


def test_t_interval_equals_a_published_example():
    # Mean 2.0/10, s = 0.1, n = 3: half-width 4.303 * 0.1 / sqrt(3).
    low, high = t_interval([0.1, 0.2, 0.3])
    assert (low, high) == (0.0, pytest.approx(0.2 + 0.24843, abs=1e-4))


def test_wilson_interval_is_not_empty_at_the_edges():
    assert wilson_interval(1.0, 100) == pytest.approx((0.96300, 1.0), abs=1e-4)
    assert wilson_interval(0.0, 100) == pytest.approx((0.0, 0.03699), abs=1e-4)


@pytest.mark.parametrize("num_right", range(0, 301, 10))
def test_an_interval_holds_its_mean(num_right: int):
    low, high = wilson_interval(num_right / 300, 300)
    assert 0 <= low <= num_right / 300 <= high <= 1


def test_several_seeds_become_one_mean_with_an_interval():
    points = [Point("b", 200, 0.5, 300, seed) for seed in (0, 1, 2)]
    points += [Point("a", 100, accuracy, 300, seed) for seed, accuracy in enumerate((0.2, 0.4, 0.6))]
    first, second = summarize(points)
    assert (first.arm, first.mean, first.low, first.high, first.num_seeds) == ("b", 0.5, 0.5, 0.5, 3)
    assert second.mean == pytest.approx(0.4) and second.low < 0.2 and second.high > 0.6


def test_report_holds_a_row_per_arm_and_a_picture(tmp_path: Path):
    summaries = summarize([Point("plain", 100_000, 0.1, 100, 0), Point("thinking", 200_000, 1.0, 100, 0)])
    write_report(tmp_path, summaries, "A title", chance=0.14)
    table = (tmp_path / "table.md").read_text()
    assert table == markdown(summaries, "A title")
    assert "| plain | 10 [6, 17] |  |" in table and "Wilson" in table
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_another_kind_are_refused(tmp_path: Path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="no results there"):
        read_points(path)
    path.write_text(json.dumps({"points": [{"arm": "x"}]}))
    with pytest.raises(UserError, match="not a results file"):
        read_points(path)


def test_the_difference_of_two_shares_equals_a_published_example():
    # Newcombe 1998, table II, example (a), method 10: 56/70 against 48/80.
    first, second = Point("a", 1, 48 / 80, 80, 0), Point("b", 1, 56 / 70, 70, 0)
    assert difference([first], [second]) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_differences_are_paired_over_the_seeds():
    """Seeds that differ much do not hide that one arm is always a little better; others are not compared."""
    first = [Point("a", 1, accuracy, 100, seed) for seed, accuracy in enumerate((0.1, 0.5, 0.9))]
    second = [Point("b", 1, accuracy, 100, seed) for seed, accuracy in ((2, 0.95), (0, 0.14), (1, 0.54), (7, 0.0))]
    mean, low, high = difference(first, second)
    # Differences 0.04, 0.04, 0.05: s = 0.1/sqrt(300), half-width 4.303 s / sqrt(3).
    assert mean == pytest.approx(0.13 / 3) and (high - low) / 2 == pytest.approx(
        4.3027 * 0.1 / 300**0.5 / 3**0.5, rel=1e-4
    )
    with pytest.raises(ValueError, match="no seed in common"):
        difference(first, [Point("b", 1, 0.5, 100, 9)])
