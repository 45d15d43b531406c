"""Line charts as SVG, without any script: colours come from the page's style (classes c0 to c7)."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tpt.html_page import as_text

NUM_COLOURS = 8
_WIDTH, _HEIGHT = 520, 274
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 8, 40
_MAX_BUCKETS = 250
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    """x and y, ascending in x; all finite."""
    colour: int = 0
    dash: int = 0


def thinned(points: Sequence[tuple[float, float]], most: int = _MAX_BUCKETS) -> list[tuple[float, float]]:
    """At most two points for each of `most` stretches: the lowest and the highest, so that no spike is lost."""
    if len(points) <= 2 * most:
        return list(points)
    kept = []
    for number in range(most):
        stretch = points[number * len(points) // most : (number + 1) * len(points) // most]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within a range, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    step = next(size for size in _sizes(raw) if size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _sizes(raw: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(raw))
    return [power, 2 * power, 5 * power, 10 * power]


def short(value: float, digits: int = 4) -> str:
    """A number in a few characters: 12.5k, 3.2M, 100B, 0.0004."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def chart(
    title: str, lines: Sequence[Line], x_name: str, note: str = "", *, cuts_beginning: bool = False
) -> Iterator[str]:
    """A figure with one or more lines, their legend and a note below it, in pieces of HTML. With `cuts_beginning` it is
    as high as what comes after the first tenth, so that a steep beginning does not flatten the rest."""
    drawn = [dataclasses.replace(line, points=thinned(line.points)) for line in lines]
    points = [point for line in drawn for point in line.points]
    x_range, y_range = _range([x for x, _ in points]), _range([y for _, y in points])
    late = [y for x, y in points if x - x_range[0] > (x_range[1] - x_range[0]) / 10]
    if cuts_beginning and late:
        y_range = _range([min(y for _, y in points), *late])
    yield f"<figure><figcaption>{as_text(title)}</figcaption>\n"
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{as_text(title)}">\n'
    yield from _axes(x_range, y_range, x_name)
    inside = f"{_LEFT} {_TOP} {_WIDTH - _LEFT - _RIGHT} {_HEIGHT - _TOP - _BOTTOM}"
    yield "<svg x={} y={} width={} height={} ".format(*inside.split()) + f'viewBox="{inside}">\n'
    for line in drawn:
        yield _drawn(line, x_range, y_range)
    yield "</svg></svg>\n<ul class=legend>"
    for line in drawn:
        sign = f'<svg class=sign viewBox="0 0 24 8"><path d="M0 4H24"{_dashes(line)} /></svg>'
        value = short(line.points[-1][1])
        yield f"<li class=c{line.colour % NUM_COLOURS}>{sign}<span>{as_text(line.label)}</span> <b>{value}</b></li>"
    yield f"</ul>{f'<p>{as_text(note)}</p>' if note else ''}</figure>\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis spans: the values and some room, never nothing."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their labels, with as many digits as tell them apart."""
    digits = next(digits for digits in range(4, 20) if len({short(value, digits) for value in values}) == len(values))
    return [(value, short(value, digits)) for value in values]


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], x_name: str) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for value, label in _labelled(ticks(*y_range)):
        y = _y(value, y_range)
        yield f'<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1="{y:.1f}" y2="{y:.1f}" />'
        yield f'<text x={_LEFT - 5} y="{y + 4:.1f}" text-anchor=end>{label}</text>\n'
    for value, label in _labelled(ticks(*x_range)):
        x = _x(value, x_range)
        yield f'<line class=grid x1="{x:.1f}" x2="{x:.1f}" y1={_TOP} y2={bottom} />'
        yield f'<text x="{x:.1f}" y={bottom + 15} text-anchor=middle>{label}</text>\n'
    yield f"<text x={_WIDTH - _RIGHT} y={_HEIGHT - 6} text-anchor=end>{as_text(x_name)}</text>\n"


def _drawn(line: Line, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    places = [(_x(x, x_range), _y(y, y_range)) for x, y in line.points]
    colour, title = f"class=c{line.colour % NUM_COLOURS}", f"<title>{as_text(line.label)}</title>"
    if len(places) == 1:
        [(x, y)] = places
        return f'<circle {colour} cx="{x:.1f}" cy="{y:.1f}" r=4>{title}</circle>\n'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path {colour} d="{path}"{_dashes(line)}>{title}</path>\n'


def _dashes(line: Line) -> str:
    pattern = _DASHES[line.dash % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _x(value: float, span: tuple[float, float]) -> float:
    return _LEFT + (value - span[0]) / (span[1] - span[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, span: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (value - span[0]) / (span[1] - span[0]) * (_HEIGHT - _TOP - _BOTTOM)
