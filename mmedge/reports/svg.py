"""Four plots as inline SVG: stacked bars, ranges, lines, and a scatter.

Every plot is 420 units wide, so that on a telephone and on a desk its text has nearly the size of
the text around it. Colours are classes, `s0` to `s5`, which the page defines for light, dark and
paper; dashes and marker shapes tell series apart where colour does not. Each plot has a title and
a description for who cannot see it, and every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mmedge.reports.svg_parts import (
    LEFT,
    RIGHT,
    WIDTH,
    line_part,
    nice_ticks,
    number,
    svg_plot,
    text_part,
    tick_label,
    x_axis,
)

__all__ = [
    "Bar",
    "Point",
    "Range",
    "Series",
    "line_plot",
    "range_plot",
    "scatter_plot",
    "stacked_bars",
]

_COLOURS = 6
_ROW = 46  # one bar with its label above
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar of named segments, and an optional mark across it."""

    label: str
    segments: Mapping[str, float]
    note: str = ""
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """One line from `low` to `high` with a large dot at the middle and named ticks."""

    label: str
    low: float
    high: float
    middle: float
    ticks: Mapping[str, float]
    note: str = ""
    series: int = 0


@dataclass(frozen=True, slots=True)
class Series:
    """One polyline of (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One disc of a scatter, its area in proportion to `size`."""

    label: str
    x: float
    y: float
    size: float
    note: str = ""


def _row_labels(top: float, label: str, note: str, right: float) -> tuple[str, str]:
    """Return a row's label and its note, the label cut where the note begins."""
    room = int((right - 8 - 7.6 * len(note)) / 8.2)
    shown = label if len(label) <= room else label[: max(room - 1, 1)] + "\u2026"
    return text_part(4.0, top + 12, shown, "label"), text_part(
        right, top + 12, note, "value", "end"
    )


def _colour(index: int) -> str:
    return f"s{index % _COLOURS}"


def _legend(
    labels: Mapping[str, int], y: float, *, dashed: bool = False
) -> tuple[list[str], float]:
    """Return the legend's parts, by label its series, and the height that it takes."""
    parts: list[str] = []
    x, row = 4.0, 0
    for label, index in labels.items():
        needed = 32 + 7.2 * len(label)
        if x > 4 and x + needed > WIDTH:
            x, row = 4.0, row + 1
        top = y + row * 18
        if dashed:
            dash = _DASHES[index % len(_DASHES)]
            parts.append(
                f'<line x1="{x:.1f}" y1="{top - 4:.1f}" x2="{x + 18:.1f}" y2="{top - 4:.1f}" '
                f'class="curve {_colour(index)}" stroke-dasharray="{dash}"/>'
            )
        else:
            parts.append(
                f'<rect x="{x:.1f}" y="{top - 10:.1f}" width="12" height="12" rx="2" '
                f'class="fill {_colour(index)}"/>'
            )
        parts.append(text_part(x + (24 if dashed else 18), top, label, "small"))
        x += needed
    return parts, (row + 1) * 18.0


def _linear_ticks(limit: float, left: float, right: float) -> list[tuple[float, str]]:
    return [
        (left + (right - left) * tick / limit, tick_label(tick)) for tick in nice_ticks(0, limit)
    ]


def stacked_bars(
    title: str,
    bars: Sequence[Bar],
    *,
    unit: str,
    order: Sequence[str] = (),
    description: str = "",
) -> str:
    """Draw horizontal bars from zero, their segments side by side.

    Args:
        title: What it shows.
        bars: At least one; segments of the same name have the same colour.
        unit: Of the axis.
        order: Names in the order of the colours, for plots that are to agree on them.
        description: Said to who cannot see it, after the title.
    """
    names = dict.fromkeys(name for bar in bars for name in bar.segments)
    colours = {name: i for i, name in enumerate(dict.fromkeys((*order, *names))) if name in names}
    limit = max(max(sum(bar.segments.values()), bar.mark or 0.0) for bar in bars) * 1.02 or 1.0
    left, right = 4.0, float(WIDTH - RIGHT)
    scale = (right - left) / limit
    bottom = 8.0 + _ROW * len(bars)
    body = x_axis(_linear_ticks(limit, left, right), 4, bottom, unit)
    for row, bar in enumerate(bars):
        top = 8.0 + _ROW * row
        body += _row_labels(top, bar.label, bar.note, right)
        x = left
        for name, value in bar.segments.items():
            width = max(value, 0.0) * scale
            tip = escape(f"{bar.label}: {name} {number(value)} {unit}")
            body.append(
                f'<rect x="{x:.1f}" y="{top + 18:.1f}" width="{width:.1f}" height="18" '
                f'class="fill {_colour(colours[name])}"><title>{tip}</title></rect>'
            )
            x += width
        if bar.mark is not None:
            x = left + bar.mark * scale
            body.append(line_part(x, top + 15, x, top + 39, "mark"))
    legend, used = _legend({name: colours[name] for name in names}, bottom + 50)
    return svg_plot(bottom + 50 + used - 8, title, description, [*body, *legend])


def range_plot(title: str, ranges: Sequence[Range], *, unit: str, description: str = "") -> str:
    """Draw one line a sample, from its lowest figure to its highest, percentiles marked.

    Args:
        title: What it shows.
        ranges: At least one.
        unit: Of the axis.
        description: Said to who cannot see it, after the title.
    """
    limit = max(item.high for item in ranges) * 1.04 or 1.0
    left, right = 4.0, float(WIDTH - RIGHT)
    scale = (right - left) / limit
    bottom = 8.0 + _ROW * len(ranges)
    body = x_axis(_linear_ticks(limit, left, right), 4, bottom, unit)
    for row, item in enumerate(ranges):
        top, colour = 8.0 + _ROW * row, _colour(item.series)
        y = top + 28
        body += (
            *_row_labels(top, item.label, item.note, right),
            line_part(left + item.low * scale, y, left + item.high * scale, y, f"span {colour}"),
        )
        for name, value in item.ticks.items():
            x = left + value * scale
            tip = escape(f"{item.label}: {name} {number(value)} {unit}")
            body.append(
                f'<rect x="{x - 2:.1f}" y="{y - 8:.1f}" width="4" height="16" rx="1" '
                f'class="fill {colour}"><title>{tip}</title></rect>'
            )
        x = left + item.middle * scale
        tip = escape(f"{item.label}: median {number(item.middle)} {unit}")
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="fill ring {colour}">'
            f"<title>{tip}</title></circle>"
        )
    return svg_plot(bottom + 38, title, description, body)


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_ticks: Mapping[float, str] | None = None,
    description: str = "",
) -> str:
    """Draw polylines over axes that begin at zero on the left unless `x_ticks` says otherwise.

    Args:
        title: What it shows.
        series: At least one, each with at least one point.
        x_name: Under the axis.
        y_name: Above the axis.
        x_ticks: Labels by x; None for round numbers.
        description: Said to who cannot see it, after the title.
    """
    xs = [x for item in series for x, _ in item.points]
    top, bottom = 26.0, 226.0
    left, right = float(LEFT), float(WIDTH - RIGHT)
    x_low, x_high = (min(x_ticks), max(x_ticks)) if x_ticks else _bounds(xs)
    y_high = max(y for item in series for _, y in item.points) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + (right - left) * across, bottom - (bottom - top) * y / y_high

    labels = x_ticks or {tick: tick_label(tick) for tick in nice_ticks(x_low, x_high)}
    body = x_axis([(place(x, 0)[0], label) for x, label in labels.items()], top, bottom, x_name)
    for tick in nice_ticks(0, y_high):
        y = place(x_low, tick)[1]
        body += (
            line_part(left, y, right, y, "grid"),
            text_part(left - 6, y + 4, tick_label(tick), "small", "end"),
        )
    body.append(text_part(4, 14, y_name, "axis"))
    for index, item in enumerate(series):
        placed = [place(x, y) for x, y in item.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = _DASHES[index % len(_DASHES)]
        body.append(
            f'<polyline points="{path}" class="curve {_colour(index)}" stroke-dasharray="{dash}">'
            f"<title>{escape(item.label)}</title></polyline>"
        )
        if item.dots:
            for (x, y), (raw_x, raw_y) in zip(placed, item.points, strict=True):
                tip = escape(f"{item.label}: {tick_label(raw_x)}, {number(raw_y)}")
                body.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="fill {_colour(index)}">'
                    f"<title>{tip}</title></circle>"
                )
    legend, used = _legend(
        {item.label: index for index, item in enumerate(series)}, bottom + 54, dashed=True
    )
    return svg_plot(bottom + 54 + used - 8, title, description, [*body, *legend])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the range to show: from zero where that wastes little, else with some air."""
    low, high = min(values), max(values)
    if low >= 0 and low < 0.5 * high:
        return 0.0, high * 1.03 or 1.0
    air = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - air, high + air


def scatter_plot(
    title: str,
    points: Sequence[Point],
    *,
    x_name: str,
    y_name: str,
    description: str = "",
) -> str:
    """Draw labelled discs.

    Args:
        title: What it shows.
        points: At least one.
        x_name: Under the axis.
        y_name: Above the axis.
        description: Said to who cannot see it, after the title.
    """
    top, bottom = 34.0, 236.0
    left, right = float(LEFT + 10), float(WIDTH - RIGHT)
    x_high = max(point.x for point in points) * 1.2 or 1.0
    y_values = [point.y for point in points]
    spread = (max(y_values) - min(y_values)) or abs(max(y_values)) * 0.01 or 1.0
    y_low, y_high = min(y_values) - spread * 0.35, max(y_values) + spread * 0.35
    largest = max(point.size for point in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * x / x_high,
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    ticks = [(place(tick, y_low)[0], tick_label(tick)) for tick in nice_ticks(0, x_high)]
    body = x_axis(ticks, top, bottom, x_name)
    for tick in nice_ticks(y_low, y_high):
        y = place(0, tick)[1]
        body += (
            line_part(left, y, right, y, "grid"),
            text_part(left - 6, y + 4, tick_label(tick), "small", "end"),
        )
    body.append(text_part(4, 14, y_name, "axis"))
    for index, point in enumerate(points):
        x, y = place(point.x, point.y)
        radius = 5 + 17 * math.sqrt(point.size / largest)
        anchor, shift = ("end", -radius - 5) if x > WIDTH * 0.6 else ("start", radius + 5)
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" '
            f'class="fill disc {_colour(index)}"><title>{escape(f"{point.label}: {point.note}")}'
            "</title></circle>"
        )
        body += (
            text_part(x + shift, y - 1, point.label, "label", anchor),
            text_part(x + shift, y + 14, point.note, "small", anchor),
        )
    return svg_plot(bottom + 38, title, description, body)
