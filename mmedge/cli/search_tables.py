"""What a search tried, as `convert` and `inspect` print it: at 80 columns, and in a pipe."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mmedge.cli.output import human_bytes, plain
from mmedge.cli.quality_tables import figure_cell

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from mmedge.bundle.manifest import Role
    from mmedge.bundle.tuning import Candidate, SearchRecord

__all__ = ["SearchTables", "search_lines", "search_tables"]

_NONE = "-"
_LEAST_WIDTH = 40
_NUMBERS = frozenset({"size", "ms", "mJ"})
_CHEAP = {"latency": "fast", "size": "small", "energy": "frugal"}
_LEGEND = (
    "drop: what is lost of the metric, with its 95 % interval. ms: median of one call at batch 1. "
    "of fp32: its time over that of the fastest fp32 in the same rounds, below 1 is faster. "
    "chosen: what load takes. front: in the bundle too. dropped: not in the bundle."
)


class SearchTables:
    """What a search tried for each role, for rich to print at whatever width there is.

    Args:
        roles: By name; those without a search are left out.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._records = {
            name: role.search for name, role in roles.items() if role.search is not None
        }

    def __bool__(self) -> bool:
        """Tell whether there is anything to show."""
        return bool(self._records)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        from rich.text import Text

        for index, (name, record) in enumerate(self._records.items()):
            title = f"Search: {_safe(name)}"
            yield Text(f"\n{title}" if index else title, style="bold")
            for line, style in search_lines(record, options.max_width):
                yield Text(line, style=style)
        if self._records:
            yield Text("\n" + "\n".join(_folded(_LEGEND, options.max_width)), style="dim")


def search_tables(roles: Mapping[str, Role]) -> SearchTables:
    """Return what to print: of each role that was searched, every candidate and what became of it.

    It is false where no role was searched.
    """
    return SearchTables(roles)


def search_lines(record: SearchRecord, width: int) -> Iterator[tuple[str, str]]:
    """Yield a record's lines, safe for a terminal, each with its style.

    Where everything fits beside the name, a candidate is one line; in a pipe it does. Else the
    reason stands under the figures, and where these do not fit either, they stand under the name.

    Args:
        record: What was tried.
        width: Columns of the terminal.
    """
    width = max(width, _LEAST_WIDTH)
    for text in _about(record):
        for line in _folded(text, width, "  "):
            yield line, "dim"
    rows = [_cells(one, record) for one in record.candidates]
    heads = [head for head in rows[0] if any(row[head] != _NONE for row in rows)]
    sizes = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    names = max(len("variant"), *(len(_safe(one.variant)) for one in record.candidates))
    beside = 2 + names + 2 + sum(sizes.values()) + 2 * (len(heads) - 1)
    flat = beside + 2 + max(len(_safe(one.reason)) for one in record.candidates) <= width
    stacked = beside > width
    indent = 6 if stacked else 2 + names + 2
    if stacked:
        heads.remove("verdict")

    title = _row({head: head for head in heads}, heads, sizes)
    if stacked:
        yield "  variant: verdict", "bold"
        yield from _styled(_cut(" " * indent + title.rstrip(), width, indent), "bold")
    else:
        yield "  variant".ljust(indent) + title + ("  reason" if flat else ""), "bold"
    for one, row in zip(record.candidates, rows, strict=True):
        style = {"chosen": "bold", "dropped": "dim"}.get(one.verdict, "")
        name, figures = f"  {_safe(one.variant)}", _row(row, heads, sizes)
        if flat:
            yield f"{name:<{indent}}{figures}  {_safe(one.reason)}", style
            continue
        if stacked:
            yield from _styled(_folded(f"{name.strip()}: {one.verdict}", width, "  "), style)
            name = ""
        if not stacked or any(row[head] != _NONE for head in heads):
            yield from _styled(_cut(f"{name:<{indent}}{figures}".rstrip(), width, indent), style)
        yield from _styled(_folded(one.reason, width, " " * 6), style)
    for text in _outcome(record):
        yield from _styled(_folded(text, width, "  "), "")


def _about(record: SearchRecord) -> Iterator[str]:
    yield (
        f"asked for: as {_CHEAP[record.objective]} as possible, losing at most "
        f"{record.max_drop:g} of {record.metric}"
    )
    yield f"fidelity on {record.data} (n = {record.samples})"
    yield f"speed on {record.processor}, {record.threads} thread{'s' * (record.threads > 1)}"
    if record.energy_counter is not None:
        yield f"energy by {record.energy_counter}, what the idle machine takes included"


def _outcome(record: SearchRecord) -> Iterator[str]:
    chosen = next(one for one in record.candidates if one.verdict == "chosen")
    seconds = sum(one.duration_s for one in record.candidates)
    dropped = sum(one.verdict == "dropped" for one in record.candidates)
    told = f"{chosen.variant} is chosen; {dropped} of {len(record.candidates)} dropped"
    yield f"{told}, in {seconds:.0f} s." if seconds else f"{told}."
    joint = record.joint_drop
    if joint is not None:
        decimals = _decimals(record)
        yield (
            f"With every role as chosen, {record.metric} loses {joint.value:.{decimals}f} "
            f"({joint.low:.{decimals}f} to {joint.high:.{decimals}f})."
        )


def _cells(one: Candidate, record: SearchRecord) -> dict[str, str]:
    speed = one.speed
    energy = None if speed is None else speed.energy_mj
    return {
        "verdict": one.verdict,
        "drop": figure_cell(one.drop, _decimals(record)),
        "size": _NONE if one.size_bytes is None else human_bytes(one.size_bytes),
        "ms": _NONE if speed is None else _short(speed.latency_ms),
        "of fp32": _NONE if speed is None else figure_cell(speed.ratio, 2),
        "mJ": _NONE if energy is None else _short(energy),
        "backend": _NONE if speed is None else _safe(speed.backend),
    }


def _decimals(record: SearchRecord) -> int:
    """Return so many decimals that the budget has two figures."""
    if record.max_drop <= 0:
        return 4
    return min(max(3, 1 - math.floor(math.log10(record.max_drop))), 8)


def _short(value: float) -> str:
    """Return three figures, never an exponent that a person has to read."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(cells: Mapping[str, str], heads: Sequence[str], sizes: Mapping[str, int]) -> str:
    return "  ".join(
        cells[head].rjust(sizes[head]) if head in _NUMBERS else cells[head].ljust(sizes[head])
        for head in heads
    )


def _safe(text: str) -> str:
    return plain(text).replace("\n", "\\n")


def _folded(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        _safe(text),
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,  # a variant's name is one word
    )


def _cut(line: str, width: int, indent: int) -> Iterator[str]:
    """Break a line of figures that no terminal so narrow can hold."""
    while len(line) > width:
        at = line.rfind("  ", indent + 1, width)
        at = at if at > 0 and line[:at].strip() else width
        yield line[:at].rstrip()
        line = " " * min(indent, 6) + line[at:].lstrip()
    yield line


def _styled(lines: Sequence[str] | Iterator[str], style: str) -> Iterator[tuple[str, str]]:
    for line in lines:
        yield line, style
