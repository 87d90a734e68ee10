"""Contact sheet of a search: a row for each query, its hits in order, marked right or wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Hit", "Row", "draw_contact_sheet"]

_TILE = 168
_GAP = 14
_MARGIN = 20
_QUERY_WIDTH = 250
_CAPTION_LINES = 4
_LINE_HEIGHT = 15
_HEADING = 64

_INK, _PALE, _PAPER = (30, 30, 34), (120, 120, 126), (252, 252, 250)
_COLOURS = {"right": (22, 140, 60), "wrong": (200, 40, 40), "none left": (185, 185, 190)}


@dataclass(frozen=True)
class Hit:
    """One image that a search found.

    Attributes:
        image: Its file.
        caption: What it shows.
        score: Cosine similarity with the query.
        result: "right", "wrong", or "none left" where every right image is found already.
    """

    image: Path
    caption: str
    score: float
    result: str


@dataclass(frozen=True)
class Row:
    """A query and its hits, best first."""

    query: str
    note: str
    hits: Sequence[Hit]


def draw_contact_sheet(title: str, subtitle: str, rows: Sequence[Row]) -> Image.Image:
    """Draw the sheet.

    Args:
        title: Largest line, at the top.
        subtitle: Line below it.
        rows: One for each query, all with the same number of hits.
    """
    columns = max(len(row.hits) for row in rows)
    row_height = _TILE + (_CAPTION_LINES + 1) * _LINE_HEIGHT + 2 * _GAP
    width = 2 * _MARGIN + _QUERY_WIDTH + columns * (_TILE + _GAP)
    height = 2 * _MARGIN + _HEADING + len(rows) * row_height
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, font=ImageFont.load_default(24))
    draw.text((_MARGIN, _MARGIN + 34), subtitle, _PALE, font=ImageFont.load_default(14))
    for index, row in enumerate(rows):
        top = _MARGIN + _HEADING + index * row_height
        draw.line([(_MARGIN, top), (width - _MARGIN, top)], (220, 220, 222))
        _draw_query(draw, row, top + _GAP)
        for place, hit in enumerate(row.hits):
            left = _MARGIN + _QUERY_WIDTH + place * (_TILE + _GAP)
            _draw_hit(sheet, draw, hit, (left, top + _GAP))
    return sheet


def _draw_query(draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    lines = textwrap.wrap(row.query, 24)
    font = ImageFont.load_default(17)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, top + number * 22), line, _INK, font=font)
    note = textwrap.wrap(row.note, 34)
    below = top + len(lines) * 22 + 8
    for number, line in enumerate(note):
        draw.text((_MARGIN, below + number * 16), line, _PALE, font=ImageFont.load_default(13))


def _draw_hit(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, hit: Hit, corner: tuple[int, int]
) -> None:
    left, top = corner
    colour = _COLOURS[hit.result]
    with Image.open(hit.image) as image:
        sheet.paste(image.convert("RGB").resize((_TILE, _TILE)), corner)
    frame = [(left - 3, top - 3), (left + _TILE + 2, top + _TILE + 2)]
    draw.rectangle(frame, outline=colour, width=4)
    below = top + _TILE + 6
    font = ImageFont.load_default(13)
    draw.text((left, below), f"{hit.score:.3f}  {hit.result}", colour, font=font)
    lines = textwrap.wrap(hit.caption, 27, max_lines=_CAPTION_LINES, placeholder=" ...")
    for number, line in enumerate(lines):
        place = (left, below + (number + 1) * _LINE_HEIGHT)
        draw.text(place, line, _INK, font=ImageFont.load_default(12))
