"""Self-contained HTML pages: no script, font or network.

The page's content security policy allows its own style only. Every function escapes plain text;
parameters that take HTML say so. Charts repeat what the tables hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import TypeVar

__all__ = ["breakable", "card", "definitions", "figures", "header", "page", "table"]

_ABSENT = '<span class="soft" title="not measured">\u2013</span>'
_Row = TypeVar("_Row")


def page(title: str, sections: Iterable[str]) -> str:
    """Return a complete HTML document.

    Args:
        title: Plain text.
        sections: HTML, in order.
    """
    template = files("mmedge.reports").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="".join(sections))


def header(eyebrow: str, title: str, *facts: str, created: str) -> str:
    """Return the head of a page.

    Args:
        eyebrow: Kind of page.
        title: Subject.
        facts: Shown in one line below the title.
        created: ISO 8601 time, shown last, as "2026-01-31 12:00:00 UTC".
    """
    time = re.sub(r"(Z|\+00:00)$", " UTC", created.replace("T", " ", 1))
    return (
        f'<header><p class="eyebrow">mmedge {escape(eyebrow)}</p><h1>{escape(title)}</h1>'
        f'<p class="soft">{escape(" · ".join((*facts, time)))}</p></header>'
    )


def figures(charts: Mapping[str, str]) -> str:
    """Return charts, side by side if the page is wide enough.

    Args:
        charts: SVG, its caption in plain text.
    """
    shown = []
    for svg, caption in charts.items():
        title = svg.partition("<title>")[2].partition("</title>")[0]  # already escaped
        shown.append(
            f'<figure class="card"><h3>{title}</h3>{svg}'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def definitions(facts: Mapping[str, str | None], kind: str = "") -> str:
    """Return terms and their descriptions, without empty ones."""
    rows = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>"
        for term, text in facts.items()
        if text is not None
    )
    return f'<dl class="{kind}">{rows}</dl>'


def card(title: str, *parts: str) -> str:
    """Return a boxed section; `parts` are HTML."""
    return f'<section class="card"><h3>{escape(title)}</h3>{"".join(parts)}</section>'


def table(
    caption: str,
    rows: Iterable[_Row],
    columns: Mapping[str, Callable[[_Row], str | None]],
    *,
    left: Collection[str] = (),
    group: Callable[[_Row], str] = lambda _: "",
) -> str:
    """Return a table that scrolls if it is wider than the page.

    Args:
        caption: Plain text above it; the accessible name.
        rows: One object a row.
        columns: HTML of a cell by heading, None for what was not measured. The first column is the
            heading of its row.
        left: Further columns that are aligned to the left.
        group: Plain text of the line above rows of one group, "" for none.
    """
    first = next(iter(columns))
    aligned = {name: ' class="left"' if name in {first, *left} else "" for name in columns}
    body, last = [], ""
    for row in rows:
        if (name := group(row)) != last and name:
            body.append(
                f'<tr class="block"><th scope="colgroup" colspan="{len(columns)}">'
                f"<span>{breakable(name)}</span></th></tr>"
            )
        last = name
        (_, heading), *cells = ((head, cell(row) or _ABSENT) for head, cell in columns.items())
        body.append(
            f'<tr><th scope="row">{heading}</th>'
            + "".join(f"<td{aligned[head]}>{cell}</td>" for head, cell in cells)
            + "</tr>"
        )
    heads = "".join(f'<th scope="col"{aligned[name]}>{escape(name)}</th>' for name in columns)
    return (
        f'<p class="note">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table aria-label="{escape(caption)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def breakable(name: str) -> str:
    """Escape a name and let it break after dots and hyphens."""
    return re.sub(r"([.-])", r"\1<wbr>", escape(name))
