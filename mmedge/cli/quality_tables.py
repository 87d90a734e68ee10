"""Quality figures as `convert` and `inspect` print them: a row a figure, a column a variant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from mmedge.bundle.quality import Figure, Quality

__all__ = ["figure_cell", "quality_tables"]

# So many columns of a figure and its interval are readable, and mostly fit into a terminal of 80.
_AT_ONCE = 3
_NONE = "-"


def quality_tables(
    role: str, qualities: Mapping[str, Quality], width: int, *, every: bool = True
) -> Iterator[Table]:
    """Yield the tables of one role, a few variants in each; none where nothing was measured.

    Args:
        role: Its name.
        qualities: By variant name.
        width: Columns of the terminal; no figure is cut off where one variant fits.
        every: Whether to show what a figure is made of too: the two directions of recall.
    """
    names = list(qualities)
    while names:
        count = min(_AT_ONCE, len(names))
        table = _table(role, {name: qualities[name] for name in names[:count]}, every)
        while count > 1 and _width(table) > width:
            count -= 1
            table = _table(role, {name: qualities[name] for name in names[:count]}, every)
        yield table
        names = names[count:]


def _width(table: Table) -> int:
    """Return the columns that a table takes if nothing in it is folded or cut."""
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum


def figure_cell(figure: Figure | None, decimals: int = 3) -> str:
    """Return a figure with its interval, "0.984 .968-.994"; without where that has no width."""
    if figure is None:
        return _NONE
    value = f"{figure.value:.{decimals}f}"
    low, high = _end(figure.low, decimals), _end(figure.high, decimals)
    return value if low == high else f"{value} {low}\N{EN DASH}{high}"


def _end(value: float, decimals: int) -> str:
    """Return one end of an interval without the zero before the point: ".968", "-.012", "1"."""
    text = f"{value:.{decimals}f}"
    whole, _, rest = text.partition(".")
    if not rest.strip("0"):
        return whole.replace("-0", "0")
    return f"{whole.removesuffix('0')}.{rest}" if whole in {"0", "-0"} else text


def _table(role: str, qualities: Mapping[str, Quality], every: bool) -> Table:
    from rich.text import Text

    from mmedge.cli.output import new_table, plain

    table = new_table(role, *qualities, numbers=tuple(qualities))
    figures = [quality.figures for quality in qualities.values()]
    for name in _names(figures, every):
        decimals = 4 if name.startswith("cosine") else 3
        cells = [figure_cell(known.get(name), decimals) for known in figures]
        table.add_row(plain(_label(name, qualities)), *cells)
    drops = [quality.drops for quality in qualities.values()]
    if any(figure.low or figure.high for known in drops for figure in known.values()):
        table.add_row(Text("lost to fp32", style="dim"))
        for name in _names(drops, every):
            cells = [figure_cell(known.get(name)) for known in drops]
            table.add_row(f"  {plain(_label(name, qualities))}", *cells)
    return table


def _names(figures: Iterable[Mapping[str, Figure]], every: bool) -> list[str]:
    names = dict.fromkeys(name for known in figures for name in known)
    return [name for name in names if every or "_recall@" not in name]


def _label(name: str, qualities: Mapping[str, Quality]) -> str:
    if name == "top_k_overlap":
        ks = {quality.settings.get("top_k") for quality in qualities.values()}
        return f"top-{ks.pop()} overlap" if len(ks) == 1 else "top-k overlap"
    shortened = name.replace("_to_", "→")
    if "→" in shortened:
        shortened = shortened.replace("_recall", "")
    return shortened.replace("_accuracy", "").replace("_", "-")
