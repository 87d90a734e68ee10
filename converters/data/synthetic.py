"""Made-up pictures and texts, for golden vectors and for quality where nothing better was given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from mmedge.specs import Array

__all__ = ["synthetic_pictures", "synthetic_texts"]

_SIDE = 256
# Word starts and ends in the vocabularies of CLIP, sentencepiece and GPT-2.
_MARKS = re.compile(r"</w>|▁|Ġ|##")


def synthetic_pictures(count: int, seed: int) -> list[Array]:
    """Return pictures of smooth random colour with fine noise: (256, 256, 3) uint8 each.

    Most of a photograph's energy lies in its low frequencies, and so does theirs; white noise would
    become an even grey in the resize.
    """
    pictures = []
    for index in range(count):
        rng = np.random.default_rng([seed, 1, index])
        picture = np.zeros((_SIDE, _SIDE, 3), np.float32)
        for cells, strength in ((3, 0.5), (9, 0.3), (33, 0.15), (_SIDE, 0.05)):
            layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            scaled = layer.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            picture += strength * np.asarray(scaled, dtype=np.float32)
        # Averaging layers pulls towards grey; stretch the contrast again.
        stretched = (picture - 127.5) * rng.uniform(1.0, 2.5) + 127.5
        pictures.append(np.clip(stretched, 0, 255).astype(np.uint8))
    return pictures


def synthetic_texts(count: int, seed: int, tokenizer_file: Path) -> list[str]:
    """Return texts of 1 to 12 words that are drawn from a tokenizer's vocabulary."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(tokenizer_file)).get_vocab(with_added_tokens=False)
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
