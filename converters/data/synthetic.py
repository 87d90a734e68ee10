"""Synthetic samples, for golden vectors and for quality without data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedge.preprocess.config import (
    AudioConfig,
    ProcessorConfig,
    TextConfig,
    VectorConfig,
    VideoConfig,
)
from mmedge.preprocess.tokenizer import BoundedTokenizer
from mmedge.specs import Array

__all__ = ["synthetic_images", "synthetic_items", "synthetic_texts"]

_SIDE = 256
_ANY_LENGTH = 1 << 20
# Word starts and ends in the vocabularies of CLIP, sentencepiece and GPT-2.
_MARKS = re.compile(r"</w>|▁|Ġ|##")


def synthetic_items(config: ProcessorConfig, count: int, seed: int, folder: Path) -> Sequence[Any]:
    """Return items for a processor.

    Args:
        config: Of the processor.
        count: How many.
        seed: Random seed.
        folder: Where the processor's files lie.
    """
    return _SYNTHETIC[config.type](config, count, seed, folder)


def synthetic_images(count: int, seed: int) -> list[Array]:
    """Return images of smooth random colour with fine noise: (256, 256, 3) uint8 each.

    Like photographs, they have most energy at low frequencies; white noise would
    become an even grey in the resize.
    """
    images = []
    for index in range(count):
        rng = np.random.default_rng([seed, 1, index])
        image = np.zeros((_SIDE, _SIDE, 3), np.float32)
        for cells, strength in ((3, 0.5), (9, 0.3), (33, 0.15), (_SIDE, 0.05)):
            layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            scaled = layer.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            image += strength * np.asarray(scaled, dtype=np.float32)
        # Averaging layers pulls towards grey; stretch the contrast again.
        stretched = (image - 127.5) * rng.uniform(1.0, 2.5) + 127.5
        images.append(np.clip(stretched, 0, 255).astype(np.uint8))
    return images


def synthetic_texts(count: int, seed: int, tokenizer_file: Path) -> list[str]:
    """Return texts of 1 to 12 random words of a tokenizer's vocabulary."""
    vocabulary = BoundedTokenizer(tokenizer_file, _ANY_LENGTH).vocabulary(added=False)
    words = sorted(
        {word for word in (_MARKS.sub("", token) for token in vocabulary) if _plain(word)}
    )
    if not words:
        words = sorted(json.dumps(index) for index in range(100))
    texts = []
    for index in range(count):
        rng = np.random.default_rng([seed, 2, index])
        texts.append(" ".join(rng.choice(words, int(rng.integers(1, 13)))))
    return texts


def _plain(word: str) -> bool:
    return word.isascii() and word.isalpha()


def _texts(config: TextConfig, count: int, seed: int, folder: Path) -> list[str]:
    return synthetic_texts(count, seed, folder / config.tokenizer_file)


def _sounds(config: AudioConfig, count: int, seed: int, _: Path) -> list[tuple[Array, int]]:
    """Return a few seconds of chords with noise."""
    sounds = []
    rate = config.sampling_rate
    for index in range(count):
        rng = np.random.default_rng([seed, 4, index])
        time = np.arange(int(rate * rng.uniform(1.0, 4.0))) / rate
        tones = [
            rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * rng.uniform(80, rate / 8) * time)
            for _ in range(3)
        ]
        noise = rng.uniform(0.001, 0.05) * rng.standard_normal(len(time))
        sounds.append((np.clip(sum(tones) + noise, -1, 1).astype(np.float32), rate))
    return sounds


def _vectors(config: VectorConfig, count: int, seed: int, _: Path) -> list[Array]:
    rng = np.random.default_rng([seed, 5])
    drawn = rng.standard_normal((count, config.size)) * config.std + np.asarray(config.mean)
    return list(drawn.astype(np.float32))


def _videos(config: VideoConfig, count: int, seed: int, _: Path) -> list[Array]:
    """Return videos of smooth random colour that moves sideways: (frames, 256, 256, 3) uint8."""
    images = synthetic_images(count, seed)
    steps = np.random.default_rng([seed, 6]).integers(2, 40, count)
    return [
        np.stack([np.roll(image, number * step, axis=1) for number in range(config.frames)])
        for image, step in zip(images, steps, strict=True)
    ]


_SYNTHETIC: Mapping[str, Callable[[Any, int, int, Path], Sequence[Any]]] = {
    "image": lambda _config, count, seed, _folder: synthetic_images(count, seed),
    "text": _texts,
    "audio": _sounds,
    "vector": _vectors,
    "video": _videos,
}
