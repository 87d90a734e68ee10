"""Naming patches: the task beside the contrastive one that teaches what shapes look like."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from dataset import IMAGE_SIZE, PATCH_SIZE
from world import COLOURS, SHAPES, SIZES

PATCH_HEADS = (1 + len(SIZES), 1 + len(COLOURS), 1 + len(SHAPES))
"""Classes of the auxiliary head: nothing or a size, nothing or a colour, nothing or a shape."""


def patch_loss(logits: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of naming what patches show: size, colour and shape, each alone.

    Args:
        logits: (P, sum of ``PATCH_HEADS``) float32.
        kinds: (P,) int64, as ``dataset.patch_kinds`` numbers them.
    """
    shape_count, colour_count = PATCH_HEADS[2] - 1, PATCH_HEADS[1] - 1
    thing = kinds - 1
    named = torch.stack(
        [thing // (colour_count * shape_count), thing // shape_count % colour_count,
         thing % shape_count]
    )  # fmt: skip
    targets = torch.where(kinds > 0, named + 1, 0)
    # Background is most of every image and soon known.
    weight = torch.where(kinds > 0, 1.0, 0.1)
    losses = [
        torch.nn.functional.cross_entropy(part, target, reduction="none") * weight
        for part, target in zip(torch.split(logits, list(PATCH_HEADS), dim=1), targets, strict=True)
    ]
    return torch.stack(losses).sum() / weight.sum()


def window_around_a_thing(
    kinds: npt.NDArray[np.int64], rng: np.random.Generator, side: int = 4
) -> npt.NDArray[np.int64]:
    """Choose a square of patches that holds some thing, or a part of it.

    Args:
        kinds: (B, 64), what each patch shows.
        rng: Where chance comes from.
        side: Side of the square in patches.

    Returns:
        (B, side * side) indices of patches.
    """
    grid = IMAGE_SIZE // PATCH_SIZE
    centre = (rng.random(kinds.shape) * (kinds > 0)).argmax(axis=1)
    top = np.clip(centre // grid - rng.integers(1, 3, len(kinds)), 0, grid - side)
    left = np.clip(centre % grid - rng.integers(1, 3, len(kinds)), 0, grid - side)
    rows = (top[:, None] + np.arange(side))[:, :, None]
    columns = (left[:, None] + np.arange(side))[:, None, :]
    window: npt.NDArray[np.int64] = (rows * grid + columns).reshape(len(kinds), -1)
    return window


def patches_worth_seeing(
    kinds: npt.NDArray[np.int64], rng: np.random.Generator, count: int = 32
) -> npt.NDArray[np.int64]:
    """Choose the patches of things, then those around them, then background at random.

    Args:
        kinds: (B, 64), what each patch shows.
        rng: Where chance comes from.
        count: How many to choose.

    Returns:
        (B, count) indices of patches, ascending.
    """
    grid = IMAGE_SIZE // PATCH_SIZE
    shown = (kinds > 0).reshape(-1, grid, grid)
    framed = np.pad(shown, ((0, 0), (1, 1), (1, 1)))
    near = np.zeros_like(shown)
    for down in range(3):
        for right in range(3):
            near |= framed[:, down : down + grid, right : right + grid]
    worth = 2.0 * shown + near + rng.random(shown.shape)
    best = np.argsort(-worth.reshape(len(kinds), -1), axis=1)[:, :count]
    return np.sort(best, axis=1)
