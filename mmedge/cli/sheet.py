"""Contact sheet of a search's hits."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmedge.cli.output import plain
from mmedge.errors import InputError
from mmedge.files import write_atomic
from mmedge.preprocess.decode import IMAGE_SUFFIXES, ImageOptions, decode_image
from mmedge.retrieval.hit_frames import HitFrames
from mmedge.retrieval.items import Match

__all__ = ["draw_sheet", "write_sheet"]

_TILE, _GAP, _HEAD, _CAPTION, _COLUMNS = 224, 16, 48, 40, 5
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#202020", "#707070", "#e4e4e4"


def write_sheet(path: Path, title: str, matches: Sequence[Match]) -> None:
    """Write a contact sheet as PNG.

    Raises:
        StorageError: If the file cannot be written.
    """
    made = io.BytesIO()
    draw_sheet(title, matches).save(made, "PNG")
    write_atomic(path, made.getvalue())


def draw_sheet(title: str, matches: Sequence[Match]) -> Image.Image:
    """Draw the hits in rows of five, best first, each with its score and id.

    A hit in a video or a recording is drawn as the frame that was found. One whose file is gone or
    no image has an empty tile with the reason.

    Args:
        title: Above them: the query.
        matches: The hits.

    Returns:
        An RGB image.
    """
    columns = max(1, min(_COLUMNS, len(matches)))
    rows = math.ceil(len(matches) / columns)
    width = max(2, columns) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + rows * (_TILE + _CAPTION + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(22), ImageFont.load_default(14)
    head = title if matches else f"{title}: no hits"
    draw.text((_GAP, 14), _short(draw, head, large, width - 2 * _GAP), _INK, large)
    with HitFrames() as frames:
        tiles = [_thumbnail(match, frames) for match in matches]
    for number, (match, (tile, reason)) in enumerate(zip(matches, tiles, strict=True)):
        row, column = divmod(number, columns)
        left = _GAP + column * (_TILE + _GAP)
        top = _HEAD + row * (_TILE + _CAPTION + _GAP)
        draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), _EMPTY)
        if tile is None:
            text = _short(draw, reason, small, _TILE - 16)
            draw.text((left + 8, top + _TILE // 2 - 8), text, _FAINT, small)
        else:
            place = left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2
            sheet.paste(tile, place)
        draw.text((left, top + _TILE + 4), f"{match.score:.3f}", _INK, small)
        name = _short(draw, match.id, small, _TILE, end=True)
        draw.text((left, top + _TILE + 21), name, _FAINT, small)
    return sheet


def _thumbnail(match: Match, frames: HitFrames) -> tuple[Image.Image | None, str]:
    """Return an image of at most _TILE x _TILE, or None and why there is none."""
    if match.source is None:
        return None, "no file"
    path = Path(match.source)
    try:
        shown = path if path.suffix.lower() in IMAGE_SUFFIXES else frames.read(match)
        if shown is None:
            return None, path.suffix or "no image"
        image = decode_image(shown, ImageOptions(), least_side=_TILE, shrink=True)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            return None, "needs mmedge[media]"
        return None, "cannot be read" if path.exists() else "file is gone"
    copy = image.copy()
    copy.thumbnail((_TILE, _TILE))
    return copy, ""


def _short(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    *,
    end: bool = False,
) -> str:
    """Return a text on one line that fits, its end or its beginning cut off."""
    line = plain(text[-400:] if end else text[:400]).replace("\n", " ")
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(f"{line}…", font) > width:
        line = line[1:] if end else line[:-1]
    return f"…{line}" if end else f"{line}…"
