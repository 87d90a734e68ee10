"""Pareto chart of a search: loss over cost of each candidate; lower left is better.

A candidate is a mark with the number that it has in the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmedge.reports.charts import (
    LEFT,
    RIGHT,
    WIDTH,
    Frame,
    Key,
    chart,
    element,
    legend,
    line_at,
    path,
    text_at,
)

__all__ = ["OUTCOMES", "Mark", "pareto_chart"]

# Closer marks share a label.
_SAME = 7.0
# A mark beyond so many budgets, or costs of kept variants, is an arrow at the edge: drawn to scale
# it would flatten the rest.
_MOST_BUDGETS, _MOST_COSTS = 4.0, 1.25
_KINDS = {"chosen": "s2", "front": "s0", "dropped": "s5"}
OUTCOMES = {"chosen": "chosen", "front": "kept (Pareto)", "dropped": "dropped"}


@dataclass(frozen=True, slots=True)
class Mark:
    """A candidate of a search.

    Attributes:
        label: Short; the same as in the table.
        name: Shown on hover.
        x: Cost, above 0, with its interval if it has one.
        y: Loss, with its interval.
        kind: Outcome.
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


def pareto_chart(
    title: str, marks: Sequence[Mark], *, budget: float, x_name: str, y_name: str
) -> str:
    """Draw candidates by cost and loss, their intervals, the accuracy budget and the Pareto front.

    Args:
        title: Title.
        marks: At least one.
        budget: Largest loss that is accepted.
        x_name: Below the axis.
        y_name: Above the axis.
    """
    kept = [mark for mark in marks if mark.kind != "dropped"]
    frame = _pareto_frame(marks, kept or marks, budget)
    over = frame.up(budget)
    width, height = RIGHT - frame.left, over - frame.top
    body = [
        element("rect", "over", x=frame.left, y=frame.top, width=width, height=height),
        *frame.x_axis(x_name),
        *frame.y_axis(y_name),
        line_at(frame.left, over, RIGHT, over, "budget"),
        *_front(kept, frame),
    ]
    order = list(_KINDS)  # kept candidates are drawn last and lie on top
    for mark in sorted(marks, key=lambda mark: -order.index(mark.kind)):
        body += _mark(mark, frame)
    body += _labels(marks, frame, over)
    body.append(text_at(RIGHT - 3, over - 4, "budget", "small", "end"))
    kinds = {mark.kind for mark in marks}
    keys = {words: _symbol_key(kind) for kind, words in OUTCOMES.items() if kind in kinds}
    if any(mark.high > mark.low for mark in marks):
        keys["95 % interval"] = lambda x, y: line_at(x + 10, y - 11, x + 10, y + 2, "whisker s5")
    keys_drawn, height = legend(keys, frame.bottom + 54)
    about = (
        f"{len(marks)} candidates, {len(kept)} kept; {y_name} over {x_name}; the table has every "
        "value. "
    )
    return chart(height, title, [*body, *keys_drawn], about)


def _pareto_frame(marks: Sequence[Mark], kept: Sequence[Mark], budget: float) -> Frame:
    """Choose axes that show the kept candidates and the budget well."""
    seen = max(0.0, budget, *(mark.y for mark in kept))
    most = max(budget * _MOST_BUDGETS, seen * 1.5)
    near = [mark for mark in marks if mark.y <= most]
    # An interval may exceed an axis.
    high = min(most, max(seen * 1.5, *(mark.high for mark in near)))
    low = max(-most, min(0.0, *(mark.low for mark in near)))
    low = min(low, *(mark.y for mark in near))
    if not high > low:  # no loss, and none accepted
        high = low + 1e-3
    margin = (high - low) * 0.06
    x_high = min(max(m.x for m in marks), max(m.x for m in kept) * _MOST_COSTS) * 1.06
    return Frame(LEFT + 12, 30.0, 266.0, (0.0, x_high), (low - margin, high + margin))


def _front(kept: Iterable[Mark], frame: Frame) -> Iterator[str]:
    """Draw the Pareto front: at each cost, the least loss of kept candidates up to it."""
    points: list[tuple[float, float]] = []
    least = float("inf")
    for mark in sorted(kept, key=lambda mark: (mark.x, mark.y)):
        if mark.y < least:
            x, y = frame.across(mark.x), frame.up(mark.y)
            points += [(x, points[-1][1])] if points else []
            points.append((x, y))
            least = mark.y
    if points:
        line = path([*points, (RIGHT, points[-1][1])])
        yield element("polyline", "front", points=line)


def _mark(mark: Mark, frame: Frame) -> Iterator[str]:
    x, y = frame.across(mark.x), frame.up(mark.y)
    colour, tip = _KINDS[mark.kind], f"{mark.label}: {mark.name}"
    if mark.y > frame.y[1]:
        corners = path(((x - 5, frame.top + 9), (x, frame.top), (x + 5, frame.top + 9)))
        yield element("polygon", f"fill {colour}", tip, points=corners)
        return
    if mark.x > frame.x[1]:
        corners = path(((RIGHT - 9, y - 5), (RIGHT, y), (RIGHT - 9, y + 5)))
        yield element("polygon", f"fill {colour}", tip, points=corners)
        return
    kind = f"whisker {colour}"
    if mark.high > mark.low:
        yield line_at(x, frame.up(mark.low), x, frame.up(mark.high), kind)
        for end in (mark.low, mark.high):
            if frame.y[0] <= end <= frame.y[1]:
                yield line_at(x - 3, frame.up(end), x + 3, frame.up(end), kind)
    if mark.x_low is not None and mark.x_high is not None and mark.x_high > mark.x_low:
        yield line_at(frame.across(mark.x_low), y, frame.across(mark.x_high), y, kind)
    yield _symbol(mark.kind, x, y, tip)


def _symbol(kind: str, x: float, y: float, tip: str = "") -> str:
    """Return the symbol of an outcome, with a tip for marks and without for the legend."""
    colour, ring = _KINDS[kind], " ring" if tip else ""
    if kind == "chosen":
        diamond = path(((x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y)))
        return element("polygon", f"fill{ring} {colour}", tip, points=diamond)
    look, radius = (f"fill{ring}", 5.5) if kind == "front" else ("hollow", 4.0)
    return element("circle", f"{look} {colour}", tip, cx=x, cy=y, r=radius)


def _symbol_key(kind: str) -> Key:
    return lambda x, y: _symbol(kind, x + 10, y - 4.5)


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


def _labels(marks: Sequence[Mark], frame: Frame, over: float) -> Iterator[str]:
    """Draw labels beside their marks, avoiding overlaps if possible.

    Marks in one place share a label. A label away from its mark has a line to it.
    """
    groups: dict[tuple[float, float], list[Mark]] = {}
    taken = [_Box(RIGHT - 48, over - 17, RIGHT, over)]  # the word "budget"
    for mark in marks:
        # The middle of an arrow lies 5 inside the edge.
        x = RIGHT - 5 if mark.x > frame.x[1] else frame.across(mark.x)
        y = frame.top + 5 if mark.y > frame.y[1] else frame.up(mark.y)
        taken.append(_Box(x - 7, y - 7, x + 7, y + 7))
        near = (p for p in groups if abs(p[0] - x) < _SAME and abs(p[1] - y) < _SAME)
        groups.setdefault(next(near, (x, y)), []).append(mark)
    order = list(_KINDS)
    for (x, y), group in sorted(
        groups.items(), key=lambda item: min(order.index(mark.kind) for mark in item[1])
    ):
        text = ", ".join(mark.label for mark in group)
        box, distant = _free_place(x, y, 8.2 * len(text) + 2, taken, frame)
        taken.append(box)
        if distant:
            end = min(max(x, box.left), box.right)
            yield line_at(x, y, end, (box.top + box.bottom) / 2, "leader")
        dropped = all(mark.kind == "dropped" for mark in group)
        yield text_at(box.left, box.bottom - 3, text, "value" if dropped else "label")


def _free_place(
    x: float, y: float, width: float, taken: Sequence[_Box], frame: Frame
) -> tuple[_Box, bool]:
    """Return the nearest position with the least overlap, and whether it is away from (x, y)."""
    best, least, distant = _Box(x, y, x, y), float("inf"), False
    for ring in range(6):
        off = 8 + 13.0 * ring
        for across, down in ((1, 0), (-1, 0), (1, -1), (-1, -1), (0, -1), (1, 1), (-1, 1), (0, 1)):
            left = x + off if across > 0 else x - off - width if across < 0 else x - width / 2
            top = y - 7.5 + down * (off + (7 if across == 0 else 2))
            box = _Box(left, top, left + width, top + 15)
            if box.left < frame.left or box.right > WIDTH - 2:
                continue
            if box.top < frame.top - 10 or box.bottom > frame.bottom:
                continue
            overlap = sum(box.overlap(other) for other in taken)
            if overlap < least:
                best, least, distant = box, overlap, ring > 0
        if least <= 0:
            break
    return best, distant
