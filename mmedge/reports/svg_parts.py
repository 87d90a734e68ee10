"""What plots are made of: figures as people read them, round ticks, texts, lines and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = [
    "LEFT",
    "RIGHT",
    "WIDTH",
    "line_part",
    "nice_ticks",
    "number",
    "svg_plot",
    "text_part",
    "tick_label",
    "x_axis",
]

# Of every plot, in units that are about pixels; and its margins.
WIDTH = 420
LEFT, RIGHT = 46, 14


def number(value: float) -> str:
    """Return a figure to three significant digits, thousands grouped, never in exponents."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Return about `count` round numbers that lie within low..high."""
    if not high > low:
        return (low,)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def tick_label(value: float) -> str:
    """Return the label of a tick."""
    return f"{value:,.6g}" if abs(value) < 1e6 else number(value)


def text_part(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    """Return a text; `kind` is its class, or its classes."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def line_part(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a straight line; `kind` is its class, or its classes."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def svg_plot(height: float, title: str, description: str, body: Sequence[str]) -> str:
    """Return a plot of the standard width; who cannot see it is told title and description."""
    label = escape(f"{title}. {description}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def x_axis(ticks: Sequence[tuple[float, str]], top: float, bottom: float, name: str) -> list[str]:
    """Return a grid line and a label for each tick (place, text), and the name."""
    parts: list[str] = []
    for x, label in ticks:
        parts.append(line_part(x, top, x, bottom, "grid"))
        parts.append(text_part(x, bottom + 15, label, "small", "middle"))
    parts.append(text_part(WIDTH - RIGHT, bottom + 31, name, "axis", "end"))
    return parts
