"""Node tables in HTML reports: formats, errors and reasons of each node."""

from __future__ import annotations

from collections import Counter
from html import escape

from mmedge.bundle.nodes import NodeEntry, NodeTable
from mmedge.reports.page import breakable, table

__all__ = ["render_nodes"]

# Series colours of the page template; grey for excluded layers.
_COLOURS = {"float32": 5, "int8": 0, "int4": 1, "float16": 2, "bfloat16": 2, "float8e4m3fn": 4}
_OTHER_COLOUR = 3
_FLOATS = frozenset({"float32", "float16", "bfloat16"})


def render_nodes(nodes: NodeTable) -> str:
    """Return a section on the nodes of one variant.

    Args:
        nodes: The node table; its strings are not trusted.

    Returns:
        HTML: a heading, a summary, and a table that can be collapsed.
    """
    largest = max((node.output_error or 0.0 for node in nodes.nodes), default=0.0)
    shown = table(
        _summary(nodes),
        nodes.nodes,
        {
            "node": lambda node: breakable(node.place[1]),
            "embedding error": lambda node: _error(node, largest),
            "format": _format,
            "weight error": lambda node: _scientific(node.weight_error),
            "input range": _range,
            "shape": lambda node: f"{node.shape[0]} \u00d7 {node.shape[1]}",
            "operator": lambda node: escape(node.op_type),
        },
        left=("embedding error", "format", "operator"),
        group=lambda node: node.place[0],
    )
    return (
        f'<section class="nodes"><h2>{escape(f"Nodes of {nodes.role}, {nodes.variant}")}</h2>'
        f"<details open><summary>{len(nodes.nodes)} nodes</summary>{shown}</details></section>"
    )


def _colour(node: NodeEntry) -> int:
    return _COLOURS.get(node.precision.partition("_")[0], _OTHER_COLOUR)


def _error(node: NodeEntry, largest: float) -> str | None:
    """Return the error and a bar in proportion; the largest error fills its cell."""
    if node.output_error is None:
        return None
    width = 100 * node.output_error / largest if largest > 0 else 0.0
    bar = f'<span class="bar s{_colour(node)}" aria-hidden="true"><i style="width:{width:.1f}%">'
    return f"{bar}</i></span> {_scientific(node.output_error)}"


def _format(node: NodeEntry) -> str:
    reason = f"<small>{escape(node.reason)}</small>" if node.reason else ""
    return f'<span class="chip s{_colour(node)}">{escape(node.precision)}</span>{reason}'


def _range(node: NodeEntry) -> str | None:
    if node.low is None or node.high is None:
        return None
    return f"{node.low:.3g} to {node.high:.3g}"


def _scientific(value: float | None) -> str | None:
    return f"{value:.1e}" if value else None if value is None else "0"


def _summary(nodes: NodeTable) -> str:
    counts = Counter(node.precision for node in nodes.nodes)
    formats = ", ".join(f"{count} in {precision}" for precision, count in counts.items())
    if counts and counts.keys() <= _FLOATS:
        return f"{formats}. The whole graph was converted, so nodes have no errors of their own."
    if not any(node.output_error is not None for node in nodes.nodes):
        return f"{formats}. Embedding errors were not measured: convert with --explain."
    return (
        f"{formats}. Embedding error: 1 - mean cosine with the fp32 embedding when only this node "
        f"is quantized, on {nodes.samples} calibration samples; for a node left in float, the "
        "error avoided. Small errors nearly add up. Weight error: norm of the difference divided "
        "by the norm of the weight."
    )
