"""Fixtures of tiny sources and of bundles converted from them, made once for all tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

__all__ = ["clip_folder", "evaluation_folder", "photo_folder", "siglip_folder", "write_pictures"]

LABELS = ("red circle", "green square", "blue star", "yellow ring")


def write_pictures(folder: Path, count: int, seed: int, *, captions: bool = False) -> Path:
    """Write pictures of noise over a colour, with captions and labels where asked."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        base = rng.integers(0, 256, 3)
        noise = rng.normal(0, 30, (40, 56, 3))
        name = f"{index:03d}.png"
        Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(folder / name)
        label = LABELS[index % len(LABELS)]
        caption = f"picture {index} of a {label}"
        lines.append(json.dumps({"image": name, "caption": caption, "label": label}))
    if captions:
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_clip

    return write_clip(tmp_path_factory.mktemp("sources") / "tiny-clip")


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_siglip

    return write_siglip(tmp_path_factory.mktemp("sources") / "tiny-siglip")


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures with captions, for calibration."""
    return write_pictures(tmp_path_factory.mktemp("data") / "photos", 40, 1, captions=True)


@pytest.fixture(scope="session")
def evaluation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four other pictures with captions and labels."""
    return write_pictures(tmp_path_factory.mktemp("data") / "held-out", 24, 2, captions=True)
