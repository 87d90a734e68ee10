"""The plot of a search: what each candidate loses over what it costs, and the front.

Down and to the left is better. A candidate is a numbered mark; its number stands in the table too.
Losses far beyond the budget would press the rest flat, so the axes end where what was kept and the
budget are well seen, and what lies beyond stands at the edge as an arrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from mmedge.reports.svg_parts import (
    LEFT,
    RIGHT,
    WIDTH,
    line_part,
    nice_ticks,
    svg_plot,
    text_part,
    tick_label,
    x_axis,
)

__all__ = ["Mark", "front_plot"]

_TOP, _BOTTOM = 30.0, 266.0
_AXIS_LEFT = LEFT + 12.0
_SAME = 7.0  # marks nearer than this share a label
_KINDS = {"chosen": "s2", "front": "s0", "dropped": "s5"}
_LEGEND = {"chosen": "chosen", "front": "front", "dropped": "dropped"}
# Beyond so many budgets, or costs of what was kept, a mark is an arrow at the edge.
_MOST_BUDGETS = 4.0
_MOST_COSTS = 1.25


@dataclass(frozen=True, slots=True)
class Mark:
    """A candidate.

    Attributes:
        label: Short; the same as in the table.
        name: What it is, told when the mark is pointed at.
        x: What it costs, above 0.
        y: What it loses.
        low: Lower end of the loss's interval.
        high: Upper end.
        kind: What became of it.
        x_low: Lower end of the cost's interval, None where it has none.
        x_high: Upper end.
    """

    label: str
    name: str
    x: float
    y: float
    low: float
    high: float
    kind: Literal["chosen", "front", "dropped"]
    x_low: float | None = None
    x_high: float | None = None


@dataclass(frozen=True, slots=True)
class _Axes:
    x_high: float
    y_low: float
    y_high: float

    def across(self, x: float) -> float:
        share = min(x / self.x_high, 1.0)
        return _AXIS_LEFT + (WIDTH - RIGHT - _AXIS_LEFT) * share

    def up(self, y: float) -> float:
        share = (min(max(y, self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        return _BOTTOM - (_BOTTOM - _TOP) * share


def front_plot(
    title: str, marks: Sequence[Mark], *, budget: float, x_name: str, y_name: str
) -> str:
    """Draw the marks, their intervals, the budget and the front of what was kept.

    Args:
        title: What it shows.
        marks: At least one.
        budget: The most that may be lost.
        x_name: Under the axis.
        y_name: Above the axis.
    """
    axes = _axes(marks, budget)
    edge = float(WIDTH - RIGHT)
    ticks = [(axes.across(tick), tick_label(tick)) for tick in nice_ticks(0, axes.x_high)]
    over = axes.up(budget)
    shade = (
        f'<rect x="{_AXIS_LEFT:.1f}" y="{_TOP:.1f}" width="{edge - _AXIS_LEFT:.1f}" '
        f'height="{over - _TOP:.1f}" class="over"/>'
    )
    body = [shade, *x_axis(ticks, _TOP, _BOTTOM, x_name)]
    for tick in nice_ticks(axes.y_low, axes.y_high):
        y = axes.up(tick)
        body += (
            line_part(_AXIS_LEFT, y, edge, y, "zero" if tick == 0 else "grid"),
            text_part(_AXIS_LEFT - 6, y + 4, tick_label(tick), "small", "end"),
        )
    body += (
        text_part(4, 14, y_name, "axis"),
        line_part(_AXIS_LEFT, over, edge, over, "budget"),
        *_staircase(marks, axes),
    )
    # What was kept is drawn last and lies on top.
    for mark in sorted(marks, key=lambda mark: ("dropped", "front", "chosen").index(mark.kind)):
        body += _mark(mark, axes)
    body += _labels(marks, axes, over)
    body.append(text_part(edge - 3, over - 4, "budget", "small", "end"))
    body += _legend(marks, _BOTTOM + 54)
    shown = sum(mark.kind != "dropped" for mark in marks)
    told = (
        f"{len(marks)} candidates, {shown} kept; {y_name} over {x_name}; every figure is in the "
        "table. "
    )
    return svg_plot(_BOTTOM + 62, title, told, body)


def _axes(marks: Sequence[Mark], budget: float) -> _Axes:
    """Choose the axes: what was kept and the budget are well seen, the rest as far as it goes."""
    kept = [mark for mark in marks if mark.kind != "dropped"] or list(marks)
    seen = max(0.0, budget, *(mark.y for mark in kept))
    most = max(budget * _MOST_BUDGETS, seen * 1.5)
    near = [mark for mark in marks if mark.y <= most]
    # An interval may reach beyond an axis: it must not press the plot flat.
    y_high = min(most, max(seen * 1.5, *(mark.high for mark in near)))
    y_low = max(-most, min(0.0, *(mark.low for mark in near)))
    y_low = min(y_low, *(mark.y for mark in near))
    if not y_high > y_low:  # nothing is lost, and nothing may be
        y_high = y_low + 1e-3
    air = (y_high - y_low) * 0.06
    most_cost = max(mark.x for mark in kept) * _MOST_COSTS
    x_high = min(max(mark.x for mark in marks), most_cost)
    return _Axes(x_high * 1.06, y_low - air, y_high + air)


def _staircase(marks: Sequence[Mark], axes: _Axes) -> Iterator[str]:
    """Draw the front: at each cost, the least that is lost by what was kept and costs no more."""
    points: list[tuple[float, float]] = []
    least = float("inf")
    kept = [mark for mark in marks if mark.kind != "dropped"]
    for mark in sorted(kept, key=lambda mark: (mark.x, mark.y)):
        if mark.y < least:
            x, y = axes.across(mark.x), axes.up(mark.y)
            if points:
                points.append((x, points[-1][1]))
            points.append((x, y))
            least = mark.y
    if points:
        points.append((float(WIDTH - RIGHT), points[-1][1]))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" class="front"/>'


def _mark(mark: Mark, axes: _Axes) -> Iterator[str]:
    x, y = axes.across(mark.x), axes.up(mark.y)
    colour = _KINDS[mark.kind]
    tip = f"<title>{escape(f'{mark.label}: {mark.name}')}</title>"
    if mark.y > axes.y_high:
        yield _shape(((x - 5, _TOP + 9), (x, _TOP), (x + 5, _TOP + 9)), f"fill {colour}", tip)
        return
    if mark.x > axes.x_high:
        right = float(WIDTH - RIGHT)
        arrow = ((right - 9, y - 5), (right, y), (right - 9, y + 5))
        yield _shape(arrow, f"fill {colour}", tip)
        return
    if mark.high > mark.low:
        yield line_part(x, axes.up(mark.low), x, axes.up(mark.high), f"whisker {colour}")
        for end in (mark.low, mark.high):
            if axes.y_low <= end <= axes.y_high:
                place = axes.up(end)
                yield line_part(x - 3, place, x + 3, place, f"whisker {colour}")
    if mark.x_low is not None and mark.x_high is not None and mark.x_high > mark.x_low:
        ends = axes.across(mark.x_low), axes.across(mark.x_high)
        yield line_part(ends[0], y, ends[1], y, f"whisker {colour}")
    if mark.kind == "chosen":
        outline = ((x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y))
        yield _shape(outline, f"fill ring {colour}", tip)
    else:
        look = "fill ring" if mark.kind == "front" else "hollow"
        radius = 5.5 if mark.kind == "front" else 4.0
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{look} {colour}">{tip}</circle>'
        )


def _shape(outline: Sequence[tuple[float, float]], kind: str, tip: str = "") -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
    return f'<polygon points="{points}" class="{kind}">{tip}</polygon>'


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


def _labels(marks: Sequence[Mark], axes: _Axes, over: float) -> Iterator[str]:
    """Yield the numbers, each beside its mark where nothing else stands.

    Marks that lie on each other share a label. Where every place beside a mark is taken, the label
    stands further off, with a line to its mark.
    """
    places = [_place(mark, axes) for mark in marks]
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(places):
        for group in groups:
            there = places[group[0]]
            if abs(there[0] - x) < _SAME and abs(there[1] - y) < _SAME:
                group.append(index)
                break
        else:
            groups.append([index])
    taken = [_Box(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    # The word at the end of the budget's line.
    taken.append(_Box(WIDTH - RIGHT - 48, over - 17, WIDTH - RIGHT, over))
    order = {"chosen": 0, "front": 1, "dropped": 2}
    groups.sort(key=lambda group: (min(order[marks[i].kind] for i in group), group))
    for group in groups:
        text = ", ".join(marks[i].label for i in group)
        x, y = places[group[0]]
        box, distance = _free_place(x, y, 8.2 * len(text) + 2, taken)
        taken.append(box)
        if distance > 0:
            middle = (box.top + box.bottom) / 2
            end = min(max(x, box.left), box.right)
            yield line_part(x, y, end, middle, "leader")
        soft = all(marks[i].kind == "dropped" for i in group)
        yield text_part(box.left, box.bottom - 3, text, "value" if soft else "label")


def _place(mark: Mark, axes: _Axes) -> tuple[float, float]:
    """Return where a mark stands: its middle, or that of its arrow."""
    if mark.y > axes.y_high:
        return axes.across(mark.x), _TOP + 5
    if mark.x > axes.x_high:
        return WIDTH - RIGHT - 5, axes.up(mark.y)
    return axes.across(mark.x), axes.up(mark.y)


def _free_place(x: float, y: float, width: float, taken: Sequence[_Box]) -> tuple[_Box, int]:
    """Return where a label overlaps least, the nearest such place, and how many rings off it is."""
    best, least, ring_of_best = _Box(x, y, x, y), float("inf"), 0
    for ring in range(6):
        off = 8 + 13.0 * ring
        for across, down in ((1, 0), (-1, 0), (1, -1), (-1, -1), (0, -1), (1, 1), (-1, 1), (0, 1)):
            left = x + off if across > 0 else x - off - width if across < 0 else x - width / 2
            top = y - 7.5 + down * (off + (7 if across == 0 else 2))
            box = _Box(left, top, left + width, top + 15)
            if box.left < _AXIS_LEFT or box.right > WIDTH - 2:
                continue
            if box.top < _TOP - 10 or box.bottom > _BOTTOM:
                continue
            overlap = sum(box.overlap(other) for other in taken)
            if overlap < least:
                best, least, ring_of_best = box, overlap, ring
        if least <= 0:
            break
    return best, ring_of_best


def _legend(marks: Sequence[Mark], y: float) -> Iterator[str]:
    kinds: Mapping[str, None] = dict.fromkeys(mark.kind for mark in marks)
    x = 4.0
    for kind, words in _LEGEND.items():
        if kind not in kinds:
            continue
        if kind == "chosen":
            middle = y - 4.5
            outline = ((x + 7, middle - 7), (x + 14, middle), (x + 7, middle + 7), (x, middle))
            yield _shape(outline, f"fill {_KINDS[kind]}")
        else:
            look = f"{'fill' if kind == 'front' else 'hollow'} {_KINDS[kind]}"
            yield f'<circle cx="{x + 7:.1f}" cy="{y - 4.5:.1f}" r="5" class="{look}"/>'
        yield text_part(x + 20, y, words, "small")
        x += 36 + 7.2 * len(words)
    if any(mark.high > mark.low for mark in marks):
        yield line_part(x + 7, y - 11, x + 7, y + 2, "whisker s5")
        yield text_part(x + 18, y, "95 % interval", "small")
