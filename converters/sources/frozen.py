"""The preprocessing of a source, written into the bundle and proven equal to the original's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmedge.converters.data.synthetic import synthetic_pictures, synthetic_texts
from mmedge.converters.families.base import Family
from mmedge.converters.sources.reference_processors import (
    check_image_preprocessing,
    check_text_preprocessing,
)
from mmedge.converters.sources.source import Source
from mmedge.files import storage_errors
from mmedge.preprocess import ImageProcessor, Preprocessing, TextProcessor
from mmedge.specs import Array, Modality

__all__ = ["Frozen", "freeze"]


@dataclass(frozen=True)
class Frozen:
    """Preprocessing as the device will do it.

    Attributes:
        preprocessing: For the manifest.
        images: The image processor.
        texts: The text processor.
        tokenizer_file: Where the tokenizer lies.
    """

    preprocessing: Preprocessing
    images: ImageProcessor
    texts: TextProcessor
    tokenizer_file: Path

    def golden(self, modality: Modality, count: int, seed: int) -> Array:
        """Return one batch of made-up samples: golden inputs hold nobody's pictures."""
        if modality is Modality.IMAGE:
            return self.images(synthetic_pictures(count, seed))[self.images.config.input]
        texts = synthetic_texts(count, seed, self.tokenizer_file)
        return self.texts(texts)[self.texts.config.input]

    def space(
        self, family: str, dim: int, weights_sha256: str, config: Mapping[str, object]
    ) -> str:
        """Return the embedding-space fingerprint of the fp32 model.

        Args:
            family: The family's name.
            dim: D of the embedding.
            weights_sha256: As `tensors_sha256` returns it.
            config: As `computing_config` returns it.
        """
        tokenizer = hashlib.sha256(self.tokenizer_file.read_bytes()).hexdigest()
        processors = self.preprocessing.model_dump(mode="json")
        known = [weights_sha256, config, processors, tokenizer, dim]
        content = json.dumps(known, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()
        return f"{family}-{dim}-{digest[:32]}"


def freeze(source: Source, family: Family, folder: Path) -> Frozen:
    """Write the tokenizer into `folder` and check both processors against transformers'.

    Raises:
        SourceError: If a processor is missing or asks for a step that mmedge does not have.
        ExportError: If a picture or a text comes out otherwise than with transformers.
        StorageError: If the disk is full.
    """
    image, text = family.image_preprocessing(source), family.text_preprocessing(source)
    tokenizer_file = folder / text.tokenizer_file
    content = family.tokenizer_json(source).encode()
    with storage_errors(tokenizer_file):
        tokenizer_file.write_bytes(content)
    check_image_preprocessing(source, image)
    check_text_preprocessing(source, folder, text)
    return Frozen(
        Preprocessing(image=image, text=text),
        ImageProcessor(image),
        TextProcessor(text, tokenizer_file),
        tokenizer_file,
    )
