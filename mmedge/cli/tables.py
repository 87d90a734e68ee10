"""Tables that commands print: in a terminal as wide as it is, in a pipe a row a line.

A command gives strings from files as they are; everything here escapes them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmedge.cli.output import plain, stdout_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["ABSENT", "Entry", "entry_lines", "facts", "folded", "print_part", "role_rows", "table"]

ABSENT = "-"
_LEAST_WIDTH = 40


def print_part(title: str, part: RenderableType, console: Console | None = None) -> None:
    """Print a part under a bold title and an empty line, the latter only below another part."""
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
    """Return a table that is as wide as its content and folds what does not fit.

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
    """Yield the rows of each role, indented under a bold line with its name; none of an empty one.

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
    """A row whose name and note may be longer than a terminal is wide.

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
    """Yield lines that are safe for a terminal and not wider than it, each with its style.

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
    """Return the lines of a text that is folded between words."""
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
    """Break a line of figures that no terminal so narrow can hold."""
    while len(line) > width:
        at = line.rfind("  ", 1, width)
        at = at if at > 0 and line[:at].strip() else width
        yield line[:at].rstrip()
        line = "    " + line[at:].lstrip()
    yield line
