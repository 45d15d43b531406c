"""Charts show what was measured: no spike is lost, and the ticks are round numbers with labels of their own."""

import math

from megatron_tpt.monitoring.charts import Line, chart, short, thinned, ticks


def test_a_spike_is_drawn_however_many_points_there_are() -> None:
    points = [(float(x), math.sin(x / 1000)) for x in range(10_000)]
    points[4321], points[8765] = (4321.0, 50.0), (8765.0, -50.0)
    kept = thinned(points)
    assert len(kept) <= 500 and {points[4321], points[8765]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:400]) == points[:400], "few points are all drawn"


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(2.31, 2.97) == [2.4, 2.6, 2.8]
    assert ticks(-0.00012, 0.00049) == [0, 0.0002, 0.0004]
    assert ticks(1e9, 1e9 + 30) == [1e9 + 5 * number for number in range(7)]


def test_numbers_are_short() -> None:
    numbers = [0.0, 0.0004, 2.34567, 1234.5, 12_500, 3.2e6, 1.5e12, -4e9]
    assert list(map(short, numbers)) == ["0", "0.0004", "2.346", "1234", "12.5k", "3.2M", "1.5T", "-4B"]


def test_neighbouring_ticks_have_different_labels_and_all_is_inside() -> None:
    lines = [Line("a<b", [(x, 1e9 + x) for x in range(30)]), Line("one point", [(3.0, 1e9)], colour=1)]
    figure = "".join(chart("tokens & more", lines, "steps", note="Not drawn: c"))
    assert "a&lt;b" in figure and "tokens &amp; more" in figure and "<p>Not drawn: c</p>" in figure
    drawing = figure[: figure.index("<ul")]
    labels = [part.partition("<")[0] for part in drawing.split("text-anchor=end>")[1:]]
    assert len(labels) == len(set(labels)) > 4
    [path] = drawing.split("<path ")[1:]
    places = [tuple(map(float, place.split())) for place in path.partition('d="M')[2].partition('"')[0].split("L")]
    assert len(places) == 30 and all(58 <= x <= 510 and 8 <= y <= 234 for x, y in places)
    assert drawing.count("<circle ") == 1


def test_a_steep_beginning_can_be_cut() -> None:
    line = Line("loss", [(x, 12.0 if x < 3 else 2.0 - x / 100) for x in range(40)])
    whole, cut = ("".join(chart("t", [line], "steps", cuts_beginning=cuts)) for cuts in (False, True))
    assert ">12</text>" in whole and ">12</text>" not in cut and ">1.8</text>" in cut
    assert 'd="M' in cut and "<b>1.61</b>" in cut
