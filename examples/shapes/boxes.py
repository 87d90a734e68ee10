"""Training data of the detector: rendered scenes with boxes, cached; labels and their wordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from chunks import in_chunks
from dataset import IMAGE_SIZE, RENDER_SIZES, model_pixels
from drawing import bounding_box, render
from world import LABELS, SHAPES, Scene, scene_at

HELD_OUT = tuple(LABELS[len(SHAPES) * i + (3 * i + 2) % len(SHAPES)] for i in range(len(SHAPES)))
"""Eight labels, each colour and each shape once, that the detector's training neither shows nor
names: "red triangle", "orange heart" and so on."""
TRAINED = tuple(label for label in LABELS if label not in HELD_OUT)
WORDINGS = (
    "{label}",
    "a {label}",
    "a photo of a {label}",
    "an image of a {label}",
    "a drawing of a {label}",
    "there is a {label}",
)
HELD_OUT_WORDINGS = ("a picture of a {label}", "we see a {label}")
"""Wordings that the detector's training never uses; the captions of its CLIP did."""
MOST_THINGS = 4
_CHUNK = 500


@dataclass(frozen=True)
class BoxDataset:
    """Rendered scenes with their boxes.

    Attributes:
        pixels: (N, 64, 64, 3) uint8.
        boxes: (N, 4, 4) float32: left, top, right, bottom as fractions; zeros where no thing is.
        labels: (N, 4) int8, positions in ``TRAINED``; -1 where no thing is.
    """

    pixels: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int8]


def load_or_render(cache: Path, count: int, seed: int) -> BoxDataset:
    """Return ``count`` training scenes, rendering them into ``cache`` on the first call."""
    folder = cache / f"boxes-{seed}-{count}"
    if not (folder / "labels.npy").exists():
        _render_all(folder, count, seed)
    return BoxDataset(
        np.load(folder / "pixels.npy", mmap_mode="r"),
        np.load(folder / "boxes.npy"),
        np.load(folder / "labels.npy"),
    )


def scene_boxes(
    scene: Scene, labels: Sequence[str] = TRAINED
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Return the boxes (4, 4) and labels (4,) of a scene, as ``BoxDataset`` holds them."""
    boxes = np.zeros((MOST_THINGS, 4), np.float32)
    found = np.full(MOST_THINGS, -1, np.int8)
    for row, thing in enumerate(scene.things):
        boxes[row], found[row] = bounding_box(thing), labels.index(thing.label)
    return boxes, found


def _render_all(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [chunk for _, chunk in in_chunks(_render_chunk, seed, count, _CHUNK)]
    np.save(folder / "pixels.npy", np.concatenate([chunk.pixels for chunk in chunks]))
    np.save(folder / "boxes.npy", np.concatenate([chunk.boxes for chunk in chunks]))
    # Written last: it marks the folder as complete.
    np.save(folder / "labels.npy", np.concatenate([chunk.labels for chunk in chunks]))


def _render_chunk(job: tuple[int, int, int]) -> BoxDataset:
    seed, start, size = job
    sides, shares = zip(*RENDER_SIZES, strict=True)
    pixels = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    truth = []
    for row in range(size):
        rng = np.random.default_rng([seed, 13, start + row])
        scene = _trained_scene(seed, start + row)
        pixels[row] = model_pixels(render(scene, int(rng.choice(sides, p=shares))))
        truth.append(scene_boxes(scene))
    boxes, labels = zip(*truth, strict=True)
    return BoxDataset(pixels, np.stack(boxes), np.stack(labels))


def _trained_scene(seed: int, index: int) -> Scene:
    """Return a training scene without held-out labels: the first of its own seeds that has none."""
    attempt = 0
    while True:
        scene = scene_at("train", index, seed + 1000 * (attempt + 1))
        if all(thing.label in TRAINED for thing in scene.things):
            return scene
        attempt += 1
