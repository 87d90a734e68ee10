"""Draw what a detector finds in scenes of the test split.

python examples/shapes/draw_detections.py detector.mmedge --out detections.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from captions import label_prompt
from drawing import render
from PIL import Image, ImageDraw, ImageFont
from world import LABELS, scenes

import mmedge

_SIDE, _GAP, _LINE = 280, 8, 15
_PAPER, _INK, _PALE = (252, 252, 250), (20, 20, 24), (255, 255, 255)


def draw(image: Image.Image, found: mmedge.Detections) -> Image.Image:
    """Return an image with the boxes, their labels and scores."""
    drawn = image.copy()
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(_LINE - 3)
    taken: list[tuple[float, float, float]] = []
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        left, top, right, bottom = (float(value) for value in box)
        pen.rectangle((left, top, right, bottom), outline=_INK)
        text = f"{label} {score:.2f}"
        width = pen.textlength(text, font) + 4
        x, y = min(left, image.width - width), top - _LINE
        free = all(
            abs(y - line) > _LINE or x > end or x + width < start for start, end, line in taken
        )
        y = y if y >= 0 and free else bottom
        taken.append((x, x + width, y))
        pen.rectangle((x, y, x + width, y + _LINE), fill=_INK)
        pen.text((x + 2, y), text, fill=_PALE, font=font)
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw the boxes that a detector finds.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--precision", help="of the bundle; default: the bundle's own")
    options = parser.parse_args(arguments)
    images = [render(each, _SIDE) for each in scenes("test", options.count, options.seed, "trio")]
    texts = [label_prompt(label, "a {label}") for label in LABELS]
    with mmedge.Detector.load(options.bundle, precision=options.precision) as detector:
        found = detector.detect(
            [np.asarray(image) for image in images], texts, threshold=options.threshold, nms=0.5
        )
    sheet = Image.new("RGB", (len(images) * (_SIDE + _GAP) + _GAP, _SIDE + 2 * _GAP), _PAPER)
    for column, (image, each) in enumerate(zip(images, found, strict=True)):
        sheet.paste(draw(image, each), (_GAP + column * (_SIDE + _GAP), _GAP))
    sheet.save(options.out)


if __name__ == "__main__":
    main()
