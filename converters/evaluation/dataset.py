"""Held-out samples, and the embeddings that a graph gives for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.converters.data.datasets import Dataset
from mmedge.converters.data.synthetic import synthetic_pictures, synthetic_texts
from mmedge.converters.evaluation.embedding import EvaluationLabels
from mmedge.converters.graphs.worker import IsolatedGraph
from mmedge.errors import CalibrationError, InputError
from mmedge.preprocess import ImageProcessor, ImageSource, TextProcessor
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["EvaluationSet", "embed", "evaluation_set"]

_SYNTHETIC = 64


@dataclass(frozen=True)
class EvaluationSet:
    """What quality is measured on.

    Attributes:
        images: N pictures.
        texts: Texts to embed: one for each picture where `known.captions` is given.
        known: Captions and labels of the pictures.
        class_texts: One text for each class.
        about_images: What the pictures are, for the manifest.
        about_texts: What the texts are, for the manifest.
    """

    images: Sequence[ImageSource]
    texts: Sequence[str]
    known: EvaluationLabels
    class_texts: Sequence[str]
    about_images: str
    about_texts: str

    def feeds(
        self, modality: Modality, images: ImageProcessor, texts: TextProcessor
    ) -> Iterator[Array]:
        """Yield the tensor of each sample, one at a time, as a device meets them.

        Dynamic quantization chooses one range for a whole batch, so figures at a larger one would
        be of another computation.

        Raises:
            CalibrationError: If a sample cannot be used.
        """
        try:
            if modality is Modality.IMAGE:
                for image in self.images:
                    yield images([image])[images.config.input]
            else:
                for text in (*self.texts, *self.class_texts):
                    yield texts([text])[texts.config.input]
        except InputError as error:
            raise CalibrationError(f"{self.about_images}: {error}") from error

    def size(self, modality: Modality) -> int:
        """Return how many tensors `feeds` yields."""
        if modality is Modality.IMAGE:
            return len(self.images)
        return len(self.texts) + len(self.class_texts)


def evaluation_set(
    data: Dataset | None, *, template: str, tokenizer_file: Path, seed: int
) -> EvaluationSet:
    """Make the evaluation set of a dataset, with synthetic samples for what it does not have.

    Args:
        data: Held-out data, or None.
        template: How a label becomes a text, "{}" standing for the label.
        tokenizer_file: Vocabulary that synthetic texts are drawn from.
        seed: Of what is drawn.

    Raises:
        CalibrationError: If there are fewer than two pictures.
    """
    texts = synthetic_texts(_SYNTHETIC, seed, tokenizer_file)
    about_texts = f"synthetic: {_SYNTHETIC} texts of random vocabulary"
    if data is None:
        about = f"synthetic: {_SYNTHETIC} noise images"
        pictures = synthetic_pictures(_SYNTHETIC, seed)
        return EvaluationSet(pictures, texts, EvaluationLabels(), (), about, about_texts)
    if len(data.samples) < 2:
        raise CalibrationError(f"{data.name}: one picture is too few to evaluate on. Add more.")
    captions = tuple(s.caption for s in data.samples if s.caption is not None)
    complete = len(captions) == len(data.samples)
    labels = tuple(sample.label for sample in data.samples)
    classes = tuple(sorted({label for label in labels if label is not None}))
    known = EvaluationLabels(
        captions=captions if complete else None,
        labels=labels if classes else None,
        classes=classes,
    )
    about = f"{data.name}: {len(data.samples)} pictures"
    if complete:
        texts, about_texts = list(captions), f"{data.name}: {len(captions)} captions"
    class_texts = [template.replace("{}", label) for label in classes]
    return EvaluationSet(
        [sample.image for sample in data.samples], texts, known, class_texts, about, about_texts
    )


def embed(
    graph: IsolatedGraph, feeds: Iterable[Array], advance: Callable[[], None] | None = None
) -> Float32Array:
    """Return the embeddings of feeds of one sample: (N, D) float32."""
    rows = []
    for feed in feeds:
        rows.append(graph.answer(feed)[0])
        if advance is not None:
            advance()
    embeddings: Float32Array = np.stack(rows).astype(np.float32, copy=False)
    return embeddings
