"""Tasks for heads on the shapes world: a question to a frame, with its exact answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from drawing import bounding_box, render
from PIL import Image
from world import COLOURS, LABELS, SHAPES, Scene, Split, Thing, relation, scenes

SIDE = 64
GRID = 8
"""Patches of the shapes encoder along a side."""
NOISE = (0.4, 24.0)
"""Contrast left at night, and the standard deviation of the noise of a pixel."""
_OPPOSITE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A scene, a question or statement, and what is right.

    Attributes:
        scene: The scene.
        text: A statement or question; "" where the task has none.
        answer: Number of the right class.
        named: The things that the text names, in its order.
    """

    scene: Scene
    text: str
    answer: int
    named: tuple[Thing, ...] = field(default=())


def relation_examples(split: Split, count: int, seed: int) -> list[Example]:
    """Statements on two of two to four things; in every second one the relation is reversed.

    Class 1 is a true statement. Image and text alone say nothing: chance is 0.5.
    """
    rng = np.random.default_rng([seed, 11])
    made: list[Example] = []
    for kind, share in (("pair", 0.5), ("trio", 0.3), ("quad", 0.2)):
        for scene in scenes(split, round(count * share), seed, kind):  # type: ignore[arg-type]
            first, second = (int(v) for v in rng.choice(len(scene.things), 2, replace=False))
            a, b = scene.things[first], scene.things[second]
            word = relation(a, b)
            if word is None:
                continue
            true = int(rng.integers(2))
            said = word if true else _OPPOSITE[word]
            made.append(Example(scene, f"a {a.label} {said} a {b.label}", true, (a, b)))
    return made


def attribute_examples(split: Split, count: int, seed: int) -> list[Example]:
    """What shape is the red thing: one of 8, among two to four things of different colours."""
    rng = np.random.default_rng([seed, 12])
    made: list[Example] = []
    for kind, share in (("pair", 0.5), ("trio", 0.3), ("quad", 0.2)):
        for scene in scenes(split, round(count * share), seed + 1, kind):  # type: ignore[arg-type]
            thing = scene.things[int(rng.integers(len(scene.things)))]
            if [other.colour for other in scene.things].count(thing.colour) > 1:
                continue
            text = f"what shape is the {thing.colour} thing"
            made.append(Example(scene, text, SHAPES.index(thing.shape), (thing,)))
    return made


def night_examples(split: Split, count: int, seed: int) -> list[Example]:
    """One thing at night: which of the 64 labels."""
    found = scenes(split, count, seed + 2, "single")
    return [Example(scene, "", LABELS.index(str(scene.label)), scene.things) for scene in found]


def frames(examples: Sequence[Example]) -> npt.NDArray[np.uint8]:
    """Render the scenes: (N, 64, 64, 3)."""
    return np.stack([np.asarray(render(each.scene, SIDE)) for each in examples])


def at_night(images: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
    """Return images as a camera with high gain sees them at night: pale, and noisy."""
    rng = np.random.default_rng([seed, 13])
    contrast, noise = NOISE
    grey = (images.astype(np.float32) - 127) * contrast + 127
    noisy = grey + rng.standard_normal(images.shape, dtype=np.float32) * noise
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def silhouettes(examples: Sequence[Example], seed: int) -> Floats:
    """Return what a sonar that is aimed at the thing sees: (N, 256), no colour, with noise."""
    rng = np.random.default_rng([seed, 14])
    made = []
    for each in examples:
        (thing,) = each.scene.things
        white = replace(thing, rgb=COLOURS["white"])
        image = render(Scene((white,), (0, 0, 0), (0, 0, 0)), SIDE).convert("L")
        reach = 1.2 * thing.radius
        box = [(v + d) * SIDE for d in (-reach, reach) for v in (thing.x, thing.y)]
        aimed = image.resize((16, 16), Image.Resampling.BILINEAR, box=_within(box))
        made.append(np.asarray(aimed, np.float32).ravel() / 255)
    rows = np.stack(made)
    return (rows + rng.standard_normal(rows.shape) * 0.3).astype(np.float32)


def _within(box: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (min(max(value, 0.0), float(SIDE)) for value in box)
    return left, top, right, bottom


def looked_at(examples: Sequence[Example]) -> Floats:
    """Return where each named thing lies: (N, named, 64), its share of each patch, summing to 1."""
    made = np.zeros((len(examples), len(examples[0].named), GRID, GRID), np.float32)
    edges = np.arange(GRID + 1) / GRID
    for row, each in enumerate(examples):
        for at, thing in enumerate(each.named):
            left, top, right, bottom = bounding_box(thing)
            across = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None)
            down = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None)
            made[row, at] = down[:, None] * across
    flat = made.reshape(*made.shape[:2], -1)
    shares: Floats = flat / np.maximum(flat.sum(-1, keepdims=True), 1e-6)
    return shares
