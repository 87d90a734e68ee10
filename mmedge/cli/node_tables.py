"""Node tables as `inspect --nodes` prints them: readable at 80 columns, greppable in a pipe."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mmedge.cli.output import plain

if TYPE_CHECKING:
    from mmedge.bundle import Bundle, NodeEntry, NodeTable

__all__ = ["node_lines", "node_tables"]

_NONE = "-"
_MOST_NAMED = 3
_HEADS = ("op", "shape", "format", "input range", "w error", "e error")


def node_tables(bundle: Bundle, role: str | None, variant: str | None) -> list[NodeTable]:
    """Return the node tables of the roles and variants asked for; None takes all.

    Raises:
        InputError: If there is no such role or variant, or none of them has a node table.
        ManifestError, IntegrityError: If a table cannot be used.
    """
    from mmedge.errors import InputError

    roles = [role] if role is not None else list(bundle.manifest.roles)
    if role is not None and variant is not None:
        chosen = [bundle.variant(role, variant)]
    else:
        chosen = [
            entry
            for name in roles
            for entry in bundle.role(name).variants
            if variant is None or variant in (entry.name, entry.precision.value)
        ]
    if variant is not None and not chosen:
        raise InputError(bundle.no_variant(variant, roles))
    tables = [table for entry in chosen if (table := bundle.nodes(entry)) is not None]
    if not tables:
        names = ", ".join(dict.fromkeys(entry.name for entry in chosen))
        raise InputError(
            f"{bundle.path} has no node table of {names}. Convert again with "
            "'mmedge convert --explain'; fp32 has none, all of it being float."
        )
    return tables


def node_lines(table: NodeTable, width: int) -> Iterator[str]:
    """Yield a table's lines, safe for a terminal.

    Where a whole name and the reason fit beside the figures, a node is one line. Else nodes stand
    under the block they belong to, and a reason under its node.

    Args:
        table: The node table.
        width: Columns of the terminal.
    """
    rows = [[*_figures(node)] for node in table.nodes]
    widths = [max(map(len, column)) for column in zip(_HEADS, *rows, strict=True)]
    figures_width = sum(widths) + 2 * len(widths)
    longest = max((len(_safe(node.name)) for node in table.nodes), default=4)
    reasons = max((len(_safe(node.reason)) for node in table.nodes), default=0)
    flat = longest + figures_width + 2 + reasons <= width
    inside = max((2 + len(_safe(node.place[1])) for node in table.nodes), default=4)
    name_width = longest if flat else max(8, min(width - figures_width, inside))

    def line(name: str, figures: Sequence[str]) -> str:
        cells = (
            figure.rjust(size) if head.endswith("error") else figure.ljust(size)
            for head, figure, size in zip(_HEADS, figures, widths, strict=True)
        )
        return f"{name:<{name_width}}  {'  '.join(cells)}".rstrip()

    yield line("node", _HEADS) + ("  reason" if flat and reasons else "")
    block = None
    for node, figures in zip(table.nodes, rows, strict=True):
        if flat:
            yield f"{line(_safe(node.name), figures)}  {_safe(node.reason)}".rstrip()
            continue
        stem, name = node.place
        if stem != block:
            yield from _folded(stem, width, "")
            block = stem
        shown = f"  {_safe(name)}" if stem else _safe(name)
        if len(shown) > name_width:
            yield from _folded(shown.strip(), width, "  " if stem else "")
            shown = ""
        yield from _cut(line(shown, figures), width)
        yield from _folded(_safe(node.reason), width, "    ")
    yield ""
    for text in _summary(table):
        yield from _folded(text, width, "")


def _figures(node: NodeEntry) -> Iterator[str]:
    yield _safe(node.op_type)
    yield f"{node.shape[0]}x{node.shape[1]}"
    yield node.precision
    unknown = node.low is None or node.high is None
    yield _NONE if unknown else f"{node.low:.3g}..{node.high:.3g}"
    for error in (node.weight_error, node.output_error):
        yield _NONE if error is None else f"{error:.1e}"


def _safe(text: str) -> str:
    return plain(text).replace("\n", "\\n")


def _folded(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        _safe(text), max(width, 20), initial_indent=indent, subsequent_indent=indent
    )


def _cut(line: str, width: int) -> Iterator[str]:
    """Break a line of figures that no terminal so narrow can hold."""
    while len(line) > max(width, 20):
        at = line.rfind("  ", 1, width)
        at = at if line[:at].strip() and at > 0 else width
        yield line[:at].rstrip()
        line = "    " + line[at:].lstrip()
    yield line


def _summary(table: NodeTable) -> Iterator[str]:
    counts = Counter(node.precision for node in table.nodes)
    yield f"{len(table.nodes)} nodes: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    measured = {
        node.name: node.output_error for node in table.nodes if node.output_error is not None
    }
    worst = sorted(measured, key=lambda name: -measured[name])[:_MOST_NAMED]
    if worst:
        yield f"most sensitive: {', '.join(worst)}"
        yield (
            "w error: of the weight, relative. e error: 1 - mean cosine of the embedding with only "
            f"this node quantized, on {table.samples} calibration samples."
        )
