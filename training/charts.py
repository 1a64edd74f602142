"""Small SVG charts for the report. Colours are CSS classes, so that a page can be light or dark.

One chart is as wide as a phone, and pages set them side by side: text keeps one size everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 22
MAX_POINTS = 300  # of a line: more than the pixels can show
MAX_CELLS = 64  # of a strip

Point = tuple[float, float | None]  # step, value (None: unknown there, and the line is broken)


@dataclass(frozen=True)
class Series:
    label: str
    style: str  # CSS class
    points: list[Point]
    dots: bool = False  # few points, each shown and named

    @property
    def last(self) -> float | None:
        return next((y for _, y in reversed(self.points) if y is not None), None)


class Mark(NamedTuple):
    """Something that happened at a step: a short stroke above the steps, or across the whole chart if it is trouble."""

    step: int
    label: str
    trouble: bool


@dataclass(frozen=True)
class Figure:
    title: str
    series: list[Series]
    from_zero: bool = False
    note: str = ""  # what the title means
    marks: Sequence[Mark] = ()

    @property
    def svg(self) -> Markup:
        return draw(self)


def draw(figure: Figure) -> Markup:
    """Lines over steps, with ticks and hairlines; the series' names stand in the page's caption."""
    series = figure.series
    known = [(x, y) for one in series for x, y in one.points if y is not None]
    assert known, f"nothing to draw: {figure.title}"
    values = [y for _, y in known] + [0.0] * figure.from_zero
    y_ticks = ticks(min(values), max(values))
    x_ticks = ticks(0, max(x for x, _ in known))
    low, high, end = y_ticks[0], y_ticks[-1], max(x for x, _ in known) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = [_y_tick(place(0, y)[1], y) for y in y_ticks]
    parts += [_x_tick(place(x, low)[0], x) for x in x_ticks if x <= end]
    parts += [_mark(place(min(mark.step, end), low)[0], mark) for mark in figure.marks]
    for one in series:
        runs = unbroken(one.points if one.dots else thinned(one.points))
        parts += [_line([place(x, y) for x, y in run], one) for run in runs]
        if one.dots:
            parts += [_dot(place(x, y), x, y, one) for run in runs for x, y in run]
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, figure.title, Markup("").join(parts)
    )


def _y_tick(y: float, value: float) -> Markup:
    return Markup('<path class="tick" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>').format(
        LEFT, y, WIDTH - RIGHT, LEFT - 6, y + 4, compact(value)
    )


def _x_tick(x: float, value: float) -> Markup:
    # The last label would otherwise run over the edge.
    style = "x end" if x > WIDTH - RIGHT - 12 else "x"
    return Markup('<text class="{}" x="{:.1f}" y="{}">{}</text>').format(style, x, HEIGHT - 6, compact(value))


def _mark(x: float, mark: Mark) -> Markup:
    top = TOP if mark.trouble else HEIGHT - BOTTOM - 7
    return Markup('<path class="mark{}" d="M{:.1f} {}V{}"><title>{}</title></path>').format(
        " trouble" if mark.trouble else "", x, top, HEIGHT - BOTTOM, mark.label
    )


def _line(places: list[tuple[float, float]], series: Series) -> Markup:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return Markup('<path class="line {}" d="M{}"/>').format(series.style, path)


def _dot(place: tuple[float, float], step: float, value: float, series: Series) -> Markup:
    return Markup(
        '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}, step {:,}: {:.3f}</title></circle>'
    ).format(series.style, *place, series.label, step, value)


def unbroken(points: list[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of points whose values are known."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points: means of neighbours, unknown where one of them is."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], _mean([y for _, y in group])) for group in groups]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose low to high."""
    if high - low < 1e-9 * max(1.0, abs(low)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin if low < 0 else max(0.0, low - margin), high + margin
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def compact(value: float) -> str:
    """A number in few characters: 7.5e-4, 3.21, 12k, 45.6M, 1.2B, 10T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{suffix}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def three_digits(value: float) -> str:
    """The same with its zeros, 2.20 beside 2.58."""
    return f"{value:#.3g}" if 0.01 <= abs(value) < 99.95 else compact(value)


def nats(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.3f}"


def strip(relative: list[float], names: list[str]) -> Markup:
    """One row of a heat map, stretched to its container. `relative` is 1 at even load; `names` are tooltips.

    Four times the even load, or a quarter of it, has the full colour.
    """
    cells = [_cell(number, load, names[number]) for number, load in enumerate(relative)]
    return Markup('<svg class="strip" viewBox="0 0 {} 1" preserveAspectRatio="none">{}</svg>').format(
        len(relative), Markup("").join(cells)
    )


def strength(load: float) -> float:
    """Of a cell's colour, 0 to 1, by its load over the even load."""
    return min(1.0, abs(math.log2(max(load, 0.01))) / 2)


def _cell(number: int, load: float, name: str) -> Markup:
    return Markup('<rect class="{}" x="{}" width="1" height="1" fill-opacity="{:.2f}"><title>{}</title></rect>').format(
        "over" if load > 1 else "under", number, strength(load), name
    )


def bins(count: int) -> list[range]:
    """`count` neighbours in at most MAX_CELLS groups of nearly equal size."""
    cells = min(count, MAX_CELLS)
    return [range(a, b) for a, b in pairwise(count * cell // cells for cell in range(cells + 1))]
