"""Charts as inline SVG: bars, ranges, lines and discs.

A chart is 420 units wide, so that its text has about the size of the page's text on a phone and on
a desktop. Colours are the classes `s0` to `s5` of the page template; dashes and shapes distinguish
series without colour. Every chart has an accessible name, and every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "LEFT",
    "RIGHT",
    "WIDTH",
    "Bar",
    "Frame",
    "Key",
    "Point",
    "Range",
    "Series",
    "chart",
    "element",
    "legend",
    "line_at",
    "line_chart",
    "nice_ticks",
    "number",
    "path",
    "range_chart",
    "scatter_chart",
    "stacked_bars",
    "text_at",
]

WIDTH = 420
LEFT, RIGHT = 46.0, WIDTH - 14.0
_ROW = 46  # one bar with its label above
_COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")

Key = Callable[[float, float], str]  # draws a legend sample at (x, baseline)


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar of named segments, and an optional mark across it."""

    label: str
    segments: Mapping[str, float]
    note: str = ""
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """A line from `low` to `high` with a large dot at the middle and named ticks."""

    label: str
    low: float
    high: float
    middle: float
    ticks: Mapping[str, float]
    note: str = ""
    series: int = 0


@dataclass(frozen=True, slots=True)
class Series:
    """A polyline of (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A disc whose area is proportional to `size`."""

    label: str
    x: float
    y: float
    size: float
    note: str = ""


def number(value: float) -> str:
    """Return three significant digits, thousands grouped, without exponent."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Return about `count` round numbers within low..high."""
    if not high > low:
        return (low,)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _tick_label(value: float) -> str:
    return f"{value:,.6g}" if abs(value) < 1e6 else number(value)


def element(tag: str, kind: str, tip: str = "", **attributes: float | str) -> str:
    """Return an element of a class; `tip` is shown on hover."""
    shown = "".join(
        f' {name.replace("_", "-")}="{escape(value) if isinstance(value, str) else f"{value:.1f}"}"'
        for name, value in attributes.items()
    )
    start = f'<{tag} class="{kind}"{shown}'
    return f"{start}><title>{escape(tip)}</title></{tag}>" if tip else f"{start}/>"


def text_at(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    """Return a text of the classes `kind`."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def line_at(x1: float, y1: float, x2: float, y2: float, kind: str, **attributes: str) -> str:
    """Return a straight line of the classes `kind`."""
    return element("line", kind, x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def path(points: Iterable[tuple[float, float]]) -> str:
    """Return the value of a `points` attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def chart(height: float, title: str, body: Iterable[str], about: str = "") -> str:
    """Return a chart of the standard width; `about` extends its accessible name."""
    label = escape(f"{title}. {about}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area and the values at its edges; values beyond them lie on the edge."""

    left: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float] = (0.0, 1.0)

    def across(self, value: float) -> float:
        """Return the position of a value of x."""
        return self.left + (RIGHT - self.left) * _share(value, *self.x)

    def up(self, value: float) -> float:
        """Return the position of a value of y."""
        return self.bottom - (self.bottom - self.top) * _share(value, *self.y)

    def x_axis(self, name: str, ticks: Mapping[float, str] | None = None) -> Iterator[str]:
        """Draw grid lines, their labels (round numbers by default) and the name."""
        for tick in ticks or nice_ticks(*self.x):
            x = self.across(tick)
            yield line_at(x, self.top, x, self.bottom, "grid")
            label = ticks[tick] if ticks else _tick_label(tick)
            yield text_at(x, self.bottom + 15, label, "small", "middle")
        yield text_at(RIGHT, self.bottom + 31, name, "axis", "end")

    def y_axis(self, name: str) -> Iterator[str]:
        """Draw grid lines, their labels and the name."""
        for tick in nice_ticks(*self.y):
            y = self.up(tick)
            zero = tick == 0 and self.y[0] < 0
            yield line_at(self.left, y, RIGHT, y, "zero" if zero else "grid")
            yield text_at(self.left - 6, y + 4, _tick_label(tick), "small", "end")
        yield text_at(4, 14, name, "axis")


def _share(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def legend(entries: Mapping[str, Key], y: float) -> tuple[list[str], float]:
    """Return the legend's parts and the height of a chart that ends with it."""
    parts: list[str] = []
    x = 4.0
    for label, key in entries.items():
        needed = 38 + 7.2 * len(label)
        if x > 4 and x + needed > WIDTH:
            x, y = 4.0, y + 18
        parts += (key(x, y), text_at(x + 24, y, label, "small"))
        x += needed
    return parts, y + 10


def _rows(frame: Frame, unit: str, items: Sequence[Bar | Range]) -> tuple[list[str], list[float]]:
    """Return axis and labels of a chart with one row per item, and the rows' positions."""
    parts, tops = [*frame.x_axis(unit)], [8.0 + _ROW * row for row in range(len(items))]
    for item, top in zip(items, tops, strict=True):
        room = int((RIGHT - 8 - 7.6 * len(item.note)) / 8.2)
        cut = item.label[: max(room - 1, 1)] + "\u2026"
        label = item.label if len(item.label) <= room else cut
        parts.append(text_at(4.0, top + 12, label, "label"))
        parts.append(text_at(RIGHT, top + 12, item.note, "value", "end"))
    return parts, tops


def stacked_bars(title: str, bars: Sequence[Bar], *, unit: str, order: Sequence[str] = ()) -> str:
    """Draw horizontal bars from zero, their segments side by side.

    Args:
        title: Title.
        bars: At least one; segments of the same name have the same colour.
        unit: Unit of the axis.
        order: Names in the order of the colours, for charts that share them.
    """
    names = dict.fromkeys(name for bar in bars for name in bar.segments)
    colours = {
        name: f"fill s{i % _COLOURS}" for i, name in enumerate(dict.fromkeys((*order, *names)))
    }
    limit = max(max(sum(bar.segments.values()), bar.mark or 0.0) for bar in bars) * 1.02 or 1.0
    frame = Frame(4.0, 4.0, 8.0 + _ROW * len(bars), (0.0, limit))
    body, tops = _rows(frame, unit, bars)
    for bar, top in zip(bars, tops, strict=True):
        total = 0.0
        for name, value in bar.segments.items():
            x, total = frame.across(total), total + value
            width = frame.across(total) - x
            tip = f"{bar.label}: {name} {number(value)} {unit}"
            body.append(
                element("rect", colours[name], tip, x=x, y=top + 18, width=width, height="18")
            )
        if bar.mark is not None:
            x = frame.across(bar.mark)
            body.append(line_at(x, top + 15, x, top + 39, "mark"))
    keys_drawn, height = legend({name: _swatch(colours[name]) for name in names}, frame.bottom + 50)
    return chart(height, title, [*body, *keys_drawn])


def _swatch(kind: str) -> Key:
    return lambda x, y: element("rect", kind, x=x + 4, y=y - 10, width="12", height="12", rx="2")


def range_chart(title: str, ranges: Sequence[Range], *, unit: str) -> str:
    """Draw one line per sample, from lowest to highest value, with percentiles marked.

    Args:
        title: Title.
        ranges: At least one.
        unit: Unit of the axis.
    """
    limit = max(item.high for item in ranges) * 1.04 or 1.0
    frame = Frame(4.0, 4.0, 8.0 + _ROW * len(ranges), (0.0, limit))
    body, tops = _rows(frame, unit, ranges)
    for item, top in zip(ranges, tops, strict=True):
        y, colour = top + 28, f"s{item.series % _COLOURS}"
        body.append(
            line_at(frame.across(item.low), y, frame.across(item.high), y, f"span {colour}")
        )
        for name, value in item.ticks.items():
            tip = f"{item.label}: {name} {number(value)} {unit}"
            size: dict[str, float | str] = {"y": y - 8, "width": "4", "height": "16", "rx": "1"}
            body.append(element("rect", f"fill {colour}", tip, x=frame.across(value) - 2, **size))
        tip = f"{item.label}: median {number(item.middle)} {unit}"
        middle = frame.across(item.middle)
        body.append(element("circle", f"fill ring {colour}", tip, cx=middle, cy=y, r=5.5))
    return chart(frame.bottom + 38, title, body)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """Draw polylines.

    Args:
        title: Title.
        series: At least one, each with at least one point.
        x_name: Below the axis.
        y_name: Above the axis, which begins at zero.
        x_ticks: Labels by x; None for round numbers.
    """
    xs = [*(x_ticks or ()), *(x for item in series for x, _ in item.points)]
    span = (min(xs), max(xs)) if x_ticks else _bounds(xs)
    highest = max(y for item in series for _, y in item.points) * 1.05 or 1.0
    frame = Frame(LEFT, 26.0, 226.0, span, (0.0, highest))
    body = [*frame.x_axis(x_name, x_ticks), *frame.y_axis(y_name)]
    keys: dict[str, Key] = {}
    for index, item in enumerate(series):
        colour, dash = f"s{index % _COLOURS}", _DASHES[index % len(_DASHES)]
        keys[item.label] = _dash(f"curve {colour}", dash)
        line = path((frame.across(x), frame.up(y)) for x, y in item.points)
        body.append(
            element("polyline", f"curve {colour}", item.label, points=line, stroke_dasharray=dash)
        )
        for x, y in item.points if item.dots else ():
            tip = f"{item.label}: {_tick_label(x)}, {number(y)}"
            place = {"cx": frame.across(x), "cy": frame.up(y)}
            body.append(element("circle", f"fill {colour}", tip, **place, r=4.5))
    keys_drawn, height = legend(keys, frame.bottom + 54)
    return chart(height, title, [*body, *keys_drawn])


def _dash(kind: str, dash: str) -> Key:
    return lambda x, y: line_at(x, y - 4, x + 18, y - 4, kind, stroke_dasharray=dash)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the range to show: from zero if that wastes little space, else with a margin."""
    low, high = min(values), max(values)
    if 0 <= low < 0.5 * high:
        return 0.0, high * 1.03 or 1.0
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def scatter_chart(title: str, points: Sequence[Point], *, x_name: str, y_name: str) -> str:
    """Draw labelled discs.

    Args:
        title: Title.
        points: At least one.
        x_name: Below the axis, which begins at zero.
        y_name: Above the axis.
    """
    ys = [point.y for point in points]
    margin = 0.35 * ((max(ys) - min(ys)) or abs(max(ys)) * 0.01 or 1.0)
    x_high = max(point.x for point in points) * 1.2 or 1.0
    y_range = (min(ys) - margin, max(ys) + margin)
    frame = Frame(LEFT + 10, 34.0, 236.0, (0.0, x_high), y_range)
    largest = max(point.size for point in points) or 1.0
    body = [*frame.x_axis(x_name), *frame.y_axis(y_name)]
    for index, point in enumerate(points):
        x, y = frame.across(point.x), frame.up(point.y)
        radius = 5 + 17 * math.sqrt(point.size / largest)
        anchor, shift = ("end", -radius - 5) if x > WIDTH * 0.6 else ("start", radius + 5)
        kind, tip = f"fill disc s{index % _COLOURS}", f"{point.label}: {point.note}"
        body += (
            element("circle", kind, tip, cx=x, cy=y, r=radius),
            text_at(x + shift, y - 1, point.label, "label", anchor),
            text_at(x + shift, y + 14, point.note, "small", anchor),
        )
    return chart(frame.bottom + 38, title, body)
