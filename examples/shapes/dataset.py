"""Training scenes rendered once and kept on disk, so that no step waits for rendering.

Images take the way they take at inference: drawn at a size that people look at, then resized by
the image processor's own recipe (bicubic). The folder is a cache and lives outside the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from captions import brief_caption, caption
from chunks import in_chunks
from drawing import render
from PIL import Image
from world import COLOURS, SHAPES, SIZES, Scene, near_miss, scene_at

IMAGE_SIZE = 64
PATCH_SIZE = 8
CAPTIONS_PER_SCENE = 5
_CHUNK = 500
RENDER_SIZES = ((128, 0.25), (224, 0.5), (320, 0.25))
"""Sides at which training scenes are drawn before the resize, and their shares."""


@dataclass(frozen=True)
class Dataset:
    """Rendered scenes; entries 2i and 2i + 1 differ in one respect (``world.near_miss``).

    Attributes:
        pixels: (N, 64, 64, 3) uint8.
        patches: (N, 64) uint8, what each patch shows, from ``patch_kinds``.
        captions: N lists of ``CAPTIONS_PER_SCENE`` texts; the last one is brief.
    """

    pixels: npt.NDArray[np.uint8]
    patches: npt.NDArray[np.uint8]
    captions: list[list[str]]


def load_or_render(cache: Path, count: int, seed: int) -> Dataset:
    """Return ``count`` training scenes, rendering them into ``cache`` on the first call."""
    folder = cache / f"train-{seed}-{count}"
    if not (folder / "captions.txt").exists():
        _render_all(folder, count, seed)
    lines = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
    captions = [lines[i : i + CAPTIONS_PER_SCENE] for i in range(0, len(lines), CAPTIONS_PER_SCENE)]
    return Dataset(*load_images(cache, count, seed), captions)


def load_images(
    cache: Path, count: int, seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the pixels (mapped, not read) and the patches of scenes that are rendered already."""
    folder = cache / f"train-{seed}-{count}"
    return np.load(folder / "pixels.npy", mmap_mode="r"), np.load(folder / "patches.npy")


def model_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Resize a square image to the model's input as CLIP's image processor does.

    Returns:
        (64, 64, 3) uint8.
    """
    resized = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def patch_kinds(scene: Scene) -> npt.NDArray[np.uint8]:
    """Return what each patch shows.

    Returns:
        (64,) uint8, row by row: 0 for background, else 1 + the index of (size, colour, shape).
    """
    side = IMAGE_SIZE // PATCH_SIZE
    centres = (np.arange(side) + 0.5) / side
    kinds = np.zeros((side, side), np.uint8)
    for thing in scene.things:
        distance = np.hypot(centres[None, :] - thing.x, centres[:, None] - thing.y)
        index = list(SIZES).index(thing.size) * len(COLOURS) + list(COLOURS).index(thing.colour)
        kind = 1 + index * len(SHAPES) + SHAPES.index(thing.shape)
        kinds[distance <= max(thing.radius, float(distance.min()))] = kind
    return kinds.reshape(-1)


def _render_all(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.lib.format.open_memmap(
        folder / "pixels.npy", "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    patches = np.zeros((count, (IMAGE_SIZE // PATCH_SIZE) ** 2), np.uint8)
    texts: list[str] = []
    for place, chunk in in_chunks(_render_chunk, seed, count, _CHUNK):
        pixels[place], patches[place] = chunk.pixels, chunk.patches
        texts += [text for scene_texts in chunk.captions for text in scene_texts]
    pixels.flush()
    np.save(folder / "patches.npy", patches)
    # Written last: it marks the folder as complete.
    (folder / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def _render_chunk(job: tuple[int, int, int]) -> Dataset:
    seed, start, size = job
    sides, shares = zip(*RENDER_SIZES, strict=True)
    pixels, patches, texts = [], [], []
    scene: Scene | None = None
    for index in range(start, start + size):
        rng = np.random.default_rng([seed, 9, index])
        other = near_miss(scene, rng) if scene is not None and index % 2 else None
        scene = other or scene_at("train", index, seed)
        pixels.append(model_pixels(render(scene, int(rng.choice(sides, p=shares)))))
        patches.append(patch_kinds(scene))
        full = [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE - 1)]
        texts.append([*full, brief_caption(scene, rng)])
    return Dataset(np.stack(pixels), np.stack(patches), texts)
