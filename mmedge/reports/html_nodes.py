"""Node tables in HTML reports: a bar for what each node does to the embedding, and the reasons.

Names and reasons come from a bundle: everything is escaped.
"""

from __future__ import annotations

from collections import Counter
from html import escape

from mmedge.bundle.nodes import NodeEntry, NodeTable

__all__ = ["render_nodes"]

_ABSENT = '<span class="soft" title="not measured">\u2013</span>'
_HEADS = ("node", "embedding error", "format", "weight error", "input range", "shape", "operator")
_LEFT = frozenset({"node", "embedding error", "format", "operator"})
# Series colours of html_style.py; grey for what was left alone.
_COLOURS = {"float32": 5, "int8": 0, "int4": 1, "float16": 2, "bfloat16": 2, "float8e4m3fn": 4}
_OTHER_COLOUR = 3
_FLOATS = frozenset({"float32", "float16", "bfloat16"})


def render_nodes(table: NodeTable) -> str:
    """Return a section on the nodes of one variant, for a page that has html_style.STYLE.

    Args:
        table: The node table; none of its strings is trusted.

    Returns:
        HTML without script: a heading, a summary, and a table that can be folded away.
    """
    title = escape(f"Nodes of {table.role}, {table.variant}")
    largest = max((node.embedding_error or 0.0 for node in table.nodes), default=0.0)
    rows, block = [], None
    for node in table.nodes:
        stem, name = node.place
        if stem != block:
            block = stem
            if stem:
                rows.append(
                    f'<tr class="block"><th scope="colgroup" colspan="{len(_HEADS)}">'
                    f"<span>{_breakable(stem)}</span></th></tr>"
                )
        rows.append(_row(node, name, largest))
    head = "".join(f'<th scope="col"{_left(name)}>{escape(name)}</th>' for name in _HEADS)
    return (
        f'<section class="nodes"><h2>{title}</h2><p class="note">{escape(_summary(table))}</p>'
        f"<details open><summary>{len(table.nodes)} nodes</summary>"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<table aria-label="{title}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )


def _row(node: NodeEntry, name: str, largest: float) -> str:
    colour = _COLOURS.get(node.precision.partition("_")[0], _OTHER_COLOUR)
    known = node.low is not None and node.high is not None
    cells = (
        _error(node.embedding_error, largest, colour),
        f'<span class="chip s{colour}">{escape(node.precision)}</span>'
        + (f"<small>{escape(node.reason)}</small>" if node.reason else ""),
        _ABSENT if node.weight_error is None else _figure(node.weight_error),
        f"{node.low:.3g} to {node.high:.3g}" if known else _ABSENT,
        f"{node.shape[0]} \u00d7 {node.shape[1]}",
        escape(node.op_type),
    )
    return (
        f'<tr><th scope="row">{_breakable(name)}</th>'
        + "".join(
            f"<td{_left(head)}>{cell}</td>" for head, cell in zip(_HEADS[1:], cells, strict=True)
        )
        + "</tr>"
    )


def _error(error: float | None, largest: float, colour: int) -> str:
    """Return the figure and a bar in proportion to it; the largest error fills its cell."""
    if error is None:
        return _ABSENT
    width = 100 * error / largest if largest > 0 else 0.0
    return (
        f'<span class="bar s{colour}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span> '
        f"{_figure(error)}"
    )


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _summary(table: NodeTable) -> str:
    counts = Counter(node.precision for node in table.nodes)
    said = ", ".join(f"{count} in {precision}" for precision, count in counts.items())
    if counts and counts.keys() <= _FLOATS:
        return f"{said}. The graph is narrowed as a whole, so nodes have no errors of their own."
    if not any(node.embedding_error is not None for node in table.nodes):
        return f"{said}. Errors of the embedding were not measured: convert with --explain."
    return (
        f"{said}. Embedding error: 1 - mean cosine with the fp32 embedding where only this node is "
        f"quantized, on {table.samples} calibration samples; of a node left in float, what that "
        "spares. While small, these errors nearly add up. Weight error: norm of the difference "
        "over the norm of the weight."
    )


def _breakable(name: str) -> str:
    """Escape a name and let a narrow page break it where its parts meet."""
    return escape(name).replace(".", ".<wbr>")


def _left(head: str) -> str:
    return ' class="left"' if head in _LEFT else ""
