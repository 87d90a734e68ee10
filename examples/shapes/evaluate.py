"""Measure an image-text model of the CLIP layout on unseen scenes and print the figures as JSON.

    python examples/shapes/evaluate.py examples/shapes/clip --write

The folder goes through transformers' own processors and model, as a user's would: PNG-sized
images in, resized by the image processor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from captions import label_prompt, relational_caption
from drawing import render
from generate import captioned
from metrics import pair_accuracy, recall_at_k, zero_shot_accuracy
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast
from world import LABELS, exchanged, mirrored, relation, scenes

Embeddings = npt.NDArray[np.float32]
ImageEncoder = Callable[[Sequence[Image.Image]], Embeddings]
TextEncoder = Callable[[Sequence[str]], Embeddings]
TEMPLATE = "a photo of a {label}"
_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Figures:
    """Measured shares, from 0 to 1.

    Attributes:
        recall_at_1: Text to image, among ``scene_count`` scenes of the test split.
        recall_at_5: As above, the right image among the first five.
        zero_shot_accuracy: Of ``single_count`` images of one thing, among 64 labels.
        relation_accuracy: True caption over the same with the relation reversed; chance is 0.5.
        binding_accuracy: True caption over the same with colours exchanged; chance is 0.5.
    """

    scene_count: int
    single_count: int
    pair_count: int
    recall_at_1: float
    recall_at_5: float
    zero_shot_accuracy: float
    relation_accuracy: float
    binding_accuracy: float


class TorchEncoders:
    """The two towers of a transformers folder, in torch."""

    def __init__(self, folder: Path, batch: int = 64) -> None:
        self._model = CLIPModel.from_pretrained(folder).eval()
        self._tokenizer = CLIPTokenizerFast.from_pretrained(folder)
        self._processor = CLIPImageProcessorPil.from_pretrained(folder)
        self._batch = batch

    def images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed images: (N, D) float32, L2-normalised."""
        parts = []
        for start in range(0, len(images), self._batch):
            some = list(images[start : start + self._batch])
            pixels = self._processor(some, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                pooled = self._model.vision_model(pixel_values=pixels).pooler_output
                parts.append(self._model.visual_projection(pooled))
        return _normalised(torch.cat(parts))

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts: (N, D) float32, L2-normalised."""
        parts = []
        for start in range(0, len(texts), self._batch):
            some = list(texts[start : start + self._batch])
            tokens = self._tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                pooled = self._model.text_model(**tokens).pooler_output
                parts.append(self._model.text_projection(pooled))
        return _normalised(torch.cat(parts))


def measure(
    encode_images: ImageEncoder, encode_texts: TextEncoder, count: int = 500, seed: int = 0
) -> Figures:
    """Measure any pair of encoders on ``count`` scenes of the test split, and on as many singles.

    Args:
        encode_images: RGB images to (N, D) float32, L2-normalised.
        encode_texts: Texts to (N, D) float32, L2-normalised.
        count: Number of scenes for retrieval; as many singles are classified.
        seed: Picks the scenes; the committed figures are those of seed 0.
    """
    pairs = captioned("test", count, seed)
    images = encode_images([render(scene, _IMAGE_SIZE) for scene, _ in pairs])
    texts = encode_texts([text for _, text in pairs])
    singles = scenes("test", count, seed, "single")
    single_images = encode_images([render(scene, _IMAGE_SIZE) for scene in singles])
    prompts = encode_texts([label_prompt(label, TEMPLATE) for label in LABELS])
    truth = [scene.things[0].label for scene in singles]
    relations, bindings, pair_count = _near_misses(encode_images, encode_texts, count // 2, seed)
    return Figures(
        scene_count=len(pairs),
        single_count=len(singles),
        pair_count=pair_count,
        recall_at_1=recall_at_k(texts, images, 1),
        recall_at_5=recall_at_k(texts, images, 5),
        zero_shot_accuracy=zero_shot_accuracy(single_images, prompts, LABELS, truth),
        relation_accuracy=relations,
        binding_accuracy=bindings,
    )


def _near_misses(
    encode_images: ImageEncoder, encode_texts: TextEncoder, count: int, seed: int
) -> tuple[float, float, int]:
    """Return relation accuracy, binding accuracy and the number of scenes of both."""
    two = scenes("test", count, seed, "pair")
    usable = [
        s
        for s in two
        if relation(*s.things) is not None and s.things[0].colour != s.things[1].colour
    ]
    images = encode_images([render(scene, _IMAGE_SIZE) for scene in usable])
    right = encode_texts([relational_caption(scene) for scene in usable])
    reversed_ = [relational_caption(mirrored(mirrored(s, "x"), "y")) for s in usable]
    recoloured = [relational_caption(exchanged(s, 0, 1)) for s in usable]
    relations = pair_accuracy(images, right, encode_texts(reversed_))
    return relations, pair_accuracy(images, right, encode_texts(recoloured)), len(usable)


def _normalised(vectors: torch.Tensor) -> Embeddings:
    unit: Embeddings = torch.nn.functional.normalize(vectors.float(), dim=-1).numpy()
    return unit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure a CLIP on unseen scenes of shapes.")
    parser.add_argument("folder", type=Path, help="a transformers folder")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep as metrics.json in the folder")
    options = parser.parse_args(arguments)
    encoders = TorchEncoders(options.folder)
    figures = asdict(measure(encoders.images, encoders.texts, options.count, options.seed))
    report = {"split": "test", "seed": options.seed}
    report |= {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    text = json.dumps(report, indent=2)
    print(text)
    if options.write:
        (options.folder / "metrics.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
