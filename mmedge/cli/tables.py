"""Tables of the commands: fitted to the terminal, or one line per row in a pipe.

A command gives strings from files as they are; everything here escapes them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmedge.cli.output import human_bytes, plain, stdout_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from mmedge.bundle.quality import Figure, Quality
    from mmedge.bundle.tuning import Candidate, SearchRecord

__all__ = [
    "ABSENT",
    "Entry",
    "entry_lines",
    "facts",
    "figure_cell",
    "figure_label",
    "folded",
    "print_part",
    "quality_tables",
    "role_rows",
    "search_lines",
    "table",
]

ABSENT = "-"
_LEAST_WIDTH = 40
# This many columns of a figure and its interval stay readable and mostly fit 80 characters.
_VARIANTS_AT_ONCE = 3
_LEGEND = (
    "loss: of the metric, with its 95 % interval. ms: median of one call at batch 1. time/fp32: "
    "relative to the fastest fp32 in the same rounds, below 1 is faster. chosen: what load() uses. "
    "kept (Pareto): also in the bundle. dropped: not in the bundle."
)


def print_part(title: str, part: RenderableType, console: Console | None = None) -> None:
    """Print a part under a bold title, with an empty line above if it is not the first."""
    from rich.text import Text

    console = console or stdout_console()
    console.print(Text(f"\n{plain(title)}", style="bold"))
    console.print(part)


def table(
    *columns: str,
    numbers: Sequence[str] = (),
    rows: Iterable[Sequence[str | Text]] = (),
    dense: bool = False,
) -> Table:
    """Return a table as wide as its content, folding text that does not fit.

    Args:
        columns: Headings.
        numbers: Headings of the columns that are aligned to the right and not folded.
        rows: Cells; text from files, escaped here.
        dense: Without a line below the headings.
    """
    from rich import box
    from rich.table import Table

    made = Table(
        box=None if dense else box.SIMPLE_HEAD,
        padding=(0, 1) if dense else (0, 1, 0, 0),
        pad_edge=not dense,
        header_style="bold",
    )
    for column in columns:
        number = column in numbers
        made.add_column(
            column,
            justify="right" if number else "left",
            no_wrap=number or (column == columns[0] and not dense),
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(plain(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def role_rows(
    roles: Mapping[str, Iterable[Sequence[str | Text]]],
) -> Iterator[Sequence[str | Text]]:
    """Yield the rows of each non-empty role, indented under its name in bold.

    Args:
        roles: Rows by role name.
    """
    from rich.text import Text

    for name, rows in roles.items():
        for index, (first, *others) in enumerate(rows):
            if index == 0:
                yield (Text(plain(name), style="bold"),)
            yield (f"  {first}", *others)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return terms, indented, and their values."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", overflow="fold")
    made.add_column(overflow="fold")
    for what, value in pairs:
        made.add_row(f"  {plain(what)}", plain(value))
    return made


@dataclass(frozen=True, slots=True)
class Entry:
    """A row whose name and note may exceed the terminal's width.

    Attributes:
        name: Its name.
        cells: Figures, one a heading.
        note: Why it is as it is.
        group: Heading above entries of one group; part of the name where there is room.
        style: Of rich.
    """

    name: str
    cells: Sequence[str]
    note: str = ""
    group: str = ""
    style: str = ""


def entry_lines(
    what: str,
    heads: Sequence[str],
    entries: Sequence[Entry],
    width: int,
    *,
    numbers: Sequence[str] = (),
) -> Iterator[tuple[str, str]]:
    """Yield styled lines that are safe for a terminal and fit its width.

    Where name, figures and note fit side by side, an entry is one line; so it is in a pipe. Else
    groups stand above their entries and notes below them, and where not even the figures fit beside
    the name, they stand below it.

    Args:
        what: Heading of the names.
        heads: Headings of the figures; those without any figure are left out.
        entries: What to list.
        width: Columns of the terminal.
        numbers: Headings of the columns that are aligned to the right.
    """
    width = max(width, _LEAST_WIDTH)
    kept = [i for i in range(len(heads)) if any(e.cells[i] != ABSENT for e in entries)]
    heads = [heads[i] for i in kept]
    rows = [[_safe(entry.cells[i]) for i in kept] for entry in entries]
    sizes = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    full = [_safe(".".join(filter(None, (e.group, e.name)))) for e in entries]
    noted = any(entry.note for entry in entries)
    figures = sum(sizes) + 2 * len(sizes)
    longest = max(map(len, (what, *full)))
    flat = longest + figures + max((2 + len(_safe(e.note)) for e in entries), default=0) <= width
    grouped = not flat and any(entry.group for entry in entries)
    names = full if flat else [("  " if e.group else "") + _safe(e.name) for e in entries]
    longest = max(map(len, (what, *names)))
    indent = longest if longest + figures <= width else 4

    def line(name: str, cells: Sequence[str]) -> Iterator[str]:
        if len(name) > indent:
            yield from folded(name, width, "  " if name.startswith(" ") else "")
            name = ""
        joined = "  ".join(
            cell.rjust(size) if head in numbers else cell.ljust(size)
            for head, cell, size in zip(heads, cells, sizes, strict=True)
        )
        if any(cell != ABSENT for cell in cells):
            yield from _cut(f"{name:<{indent}}  {joined}".rstrip(), width)

    last = ""
    for text in line(what, heads):
        yield text + ("  reason" if flat and noted else ""), "bold"
    for entry, name, cells in zip(entries, names, rows, strict=True):
        if grouped and entry.group != last:
            last = entry.group
            yield from ((text, "bold") for text in folded(last, width))
        if flat:
            (text,) = line(name, cells) if heads else (name,)
            yield f"{text}  {_safe(entry.note)}".rstrip(), entry.style
            continue
        for text in (*line(name, cells), *folded(entry.note, width, " " * 6)):
            yield text, entry.style


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """Return the lines of a text folded between words."""
    return textwrap.wrap(
        _safe(text),
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,  # a variant's name is one word
    )


def _safe(text: str) -> str:
    return plain(text).replace("\n", "\\n")


def _cut(line: str, width: int) -> Iterator[str]:
    """Break a line of figures that does not fit the terminal."""
    while len(line) > width:
        at = line.rfind("  ", 1, width)
        at = at if at > 0 and line[:at].strip() else width
        yield line[:at].rstrip()
        line = "    " + line[at:].lstrip()
    yield line


def figure_cell(figure: Figure | None, decimals: int = 3) -> str:
    """Return a figure with its interval, "0.984 .968-.994", if the interval has a width."""
    if figure is None:
        return ABSENT
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


def figure_label(name: str, qualities: Iterable[Quality]) -> str:
    """Return the display name of a figure, "recall@1", "top-10 overlap"."""
    if name == "top_k_overlap":
        ks = {quality.settings.get("top_k") for quality in qualities}
        return f"top-{ks.pop()} overlap" if len(ks) == 1 else "top-k overlap"
    shortened = name.replace("_to_", "→")
    if "→" in shortened:
        shortened = shortened.replace("_recall", "")
    return shortened.replace("_accuracy", "").replace("_", "-")


def quality_tables(role: str, qualities: Mapping[str, Quality], width: int) -> Iterator[Table]:
    """Yield tables with a row per figure and a column per variant; none if nothing was measured.

    Args:
        role: Its name.
        qualities: By variant name.
        width: Columns of the terminal; no figure is cut off where one variant fits.
    """
    names = list(qualities)
    while names:
        for count in range(min(_VARIANTS_AT_ONCE, len(names)), 0, -1):
            made = _quality_table(role, {name: qualities[name] for name in names[:count]})
            if _width(made) <= width:
                break
        yield made
        names = names[count:]


def _width(made: Table) -> int:
    """Return the width of a table without folding or cutting."""
    from rich.console import Console

    return Console(width=10_000).measure(made).maximum


def _quality_table(role: str, qualities: Mapping[str, Quality]) -> Table:
    from rich.text import Text

    known = list(qualities.values())
    rows: list[Sequence[str | Text]] = []
    for name in dict.fromkeys(name for quality in known for name in quality.figures):
        decimals = 4 if name.startswith("cosine") else 3
        cells = [figure_cell(quality.figures.get(name), decimals) for quality in known]
        rows.append((figure_label(name, known), *cells))
    drops = dict.fromkeys(name for quality in known for name in quality.drops)
    if any(figure.low or figure.high for each in known for figure in each.drops.values()):
        rows.append((Text("loss against fp32", style="dim"),))
        for name in drops:
            cells = [figure_cell(quality.drops.get(name)) for quality in known]
            rows.append((f"  {figure_label(name, known)}", *cells))
    return table(role, *qualities, numbers=tuple(qualities), rows=rows)


def search_lines(record: SearchRecord, width: int) -> Iterator[tuple[str, str]]:
    """Yield the styled lines of a search record, safe for a terminal."""
    from mmedge.reports.pareto import OUTCOMES

    for text in _request(record):
        yield from ((line, "dim") for line in folded(text, width))
    entries = [
        Entry(
            one.variant,
            (OUTCOMES[one.verdict], *_candidate(one, record)),
            one.reason,
            style={"chosen": "bold", "dropped": "dim"}.get(one.verdict, ""),
        )
        for one in record.candidates
    ]
    heads = ("result", "loss", "size", "ms", "time/fp32", "mJ", "backend")
    yield from entry_lines("variant", heads, entries, width, numbers=("size", "ms", "mJ"))
    chosen = next(one for one in record.candidates if one.verdict == "chosen")
    dropped = sum(one.verdict == "dropped" for one in record.candidates)
    seconds = sum(one.duration_s for one in record.candidates)
    result = f"Chosen: {chosen.variant}. {dropped} of {len(record.candidates)} dropped"
    result += f", in {seconds:.0f} s." if seconds else "."
    if record.joint_drop is not None:
        loss = figure_cell(record.joint_drop, record.decimals)
        result += f" With every role as chosen, the loss of {record.metric} is {loss}."
    yield from ((line, "") for line in folded(result, width))
    yield from ((line, "dim") for line in folded(_LEGEND, width))


def _request(record: SearchRecord) -> Iterator[str]:
    yield f"objective: {record.objective}; accuracy budget: {record.max_drop:g} of {record.metric}"
    yield f"quality data: {record.data} (n = {record.samples})"
    yield f"measured on: {record.processor}, {record.threads} thread{'s' * (record.threads > 1)}"
    if record.energy_counter is not None:
        yield f"energy counter: {record.energy_counter}, including the idle machine"


def _candidate(one: Candidate, record: SearchRecord) -> tuple[str, ...]:
    speed = one.speed
    energy = None if speed is None else speed.energy_mj
    return (
        figure_cell(one.drop, record.decimals),
        ABSENT if one.size_bytes is None else human_bytes(one.size_bytes),
        ABSENT if speed is None else _short(speed.latency_ms),
        ABSENT if speed is None else figure_cell(speed.ratio, 2),
        ABSENT if energy is None else _short(energy),
        ABSENT if speed is None else speed.backend,
    )


def _short(value: float) -> str:
    """Return three digits without exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
