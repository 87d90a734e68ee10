"""Scenes to images: plain Pillow, smooth edges, any resolution."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from world import Scene, Thing

_ROUND = ("circle", "ring")
_RING_HOLE = 0.5
"""Inner radius of a ring, as a fraction of its outer one."""


def render(scene: Scene, size: int | tuple[int, int] = 224) -> Image.Image:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of a square image in pixels, or (width, height). The scene's square is centred
            and as large as fits, so that resizing the shorter side and cropping the centre (what
            CLIP's image processor does) gives the square image back.

    Returns:
        An RGB image.
    """
    width, height = _sides(size)
    scale = 4 if min(width, height) < 160 else 2
    left, top, side = _square(width * scale, height * scale)
    image = _background(scene, width * scale, height * scale)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(pen, thing, left, top, side)
    return image.reduce(scale)


def pixel_box(thing: Thing, size: int | tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a thing in pixels of ``render(scene, size)``."""
    left, top, side = _square(*_sides(size))
    x0, y0, x1, y1 = (value * side for value in bounding_box(thing))
    return left + x0, top + y0, left + x1, top + y1


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _square(width: int, height: int) -> tuple[float, float, int]:
    """Return left, top and side of the scene's square in an image."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side


def _background(scene: Scene, width: int, height: int) -> Image.Image:
    ramp = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
    sky, ground = np.array(scene.sky, np.float32), np.array(scene.ground, np.float32)
    column = np.rint(sky + ramp * (ground - sky)).astype(np.uint8)[:, None, :]
    return Image.fromarray(column).resize((width, height), Image.Resampling.NEAREST)


def bounding_box(thing: Thing) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of what is drawn, as fractions of the scene's side."""
    if thing.shape in _ROUND:
        x, y, r = thing.x, thing.y, thing.radius
        return x - r, y - r, x + r, y + r
    xs, ys = zip(*_corners(thing), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, left: float, top: float, side: int) -> None:
    if thing.shape in _ROUND:
        x0, y0, x1, y1 = (value * side for value in bounding_box(thing))
        box = (left + x0, top + y0, left + x1, top + y1)
        if thing.shape == "circle":
            pen.ellipse(box, fill=thing.rgb)
        else:
            width = round(thing.radius * side * (1.0 - _RING_HOLE))
            pen.ellipse(box, outline=thing.rgb, width=width)
        return
    pen.polygon([(left + x * side, top + y * side) for x, y in _corners(thing)], fill=thing.rgb)


def _corners(thing: Thing) -> list[tuple[float, float]]:
    """Return the corners of a polygon, as fractions of the scene's side."""
    angle = math.radians(thing.rotation_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (
            thing.x + thing.radius * (cos * u - sin * v),
            thing.y + thing.radius * (sin * u + cos * v),
        )
        for u, v in _OUTLINES[thing.shape]
    ]


def _star() -> list[tuple[float, float]]:
    radii = (1.05, 0.43)
    return [
        (radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5))
        for i in range(10)
    ]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
            - 0.1,
        )
        for t in turns
    ]


def _cross(arm: float = 0.33) -> list[tuple[float, float]]:
    return [
        (-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm),
        (arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm),
    ]  # fmt: skip


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)],
    "diamond": [(0.0, -1.05), (0.66, 0.0), (0.0, 1.05), (-0.66, 0.0)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
"""Corners of each shape around its centre, in radii; y grows downwards."""
