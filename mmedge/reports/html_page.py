"""The parts of a page that needs nothing else: no script, no font, no network.

A page's content security policy forbids everything but its own style. Whatever comes from a bundle
or the machine is escaped. What plots show is in tables too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from mmedge.reports.html_style import STYLE

__all__ = ["ABSENT", "figure", "figure_grid", "html_table", "moment", "page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Stands for what was not measured.
ABSENT = '<span class="soft" title="not measured">\u2013</span>'


def page(title: str, sections: Iterable[str]) -> str:
    """Return a complete HTML document, UTF-8 when encoded.

    Args:
        title: Plain text.
        sections: HTML, in order.
    """
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def moment(created: str) -> str:
    """Return an ISO 8601 moment as people read it: "2026-01-31 12:00:00 UTC"."""
    return re.sub(r"(Z|\+00:00)$", " UTC", created.replace("T", " ", 1))


def figure_grid(drawn: Sequence[str]) -> str:
    """Return figures side by side where the page is wide enough; "" for none."""
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""


def figure(svg: str, caption: str) -> str:
    """Return a plot with its title above and a caption, plain text, below."""
    title = svg.partition("<title>")[2].partition("</title>")[0]  # already escaped
    return (
        f'<figure class="card"><h3>{title}</h3>{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def html_table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
    """Return a table that scrolls where it is wider than the page.

    Args:
        caption: Plain text, above it.
        heads: Plain text, one a column.
        rows: HTML, one cell a column; the first is the row's heading.
        left: Columns that are aligned to the left.
    """
    head = "".join(
        f'<th scope="col"{_left(i, left)}>{escape(name)}</th>' for i, name in enumerate(heads)
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{_left(i, left)}>{cell}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<p class="note">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _left(index: int, left: Sequence[int]) -> str:
    return ' class="left"' if index in left else ""
