"""Encoder: the encoder of one modality, with or without a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from mmedge.bundle.kinds import ClassHead, EncoderKind
from mmedge.errors import BundleError
from mmedge.models.batches import Skipped
from mmedge.models.classification import Classification, activate
from mmedge.models.embedding import EmbeddingModel, Images
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.preprocess.decode import Channels

__all__ = ["Encoder"]


class Encoder(EmbeddingModel):
    """The encoder of one modality, ready to run: a DINOv2, say, or an image classifier.

    with mmedge.load("vit.mmedge") as vit:
        vit.encode_image("a.jpg")
        vit.classify("a.jpg").top(5)
    """

    kind = "encoder"

    @property
    def labels(self) -> tuple[str, ...]:
        """The checkpoint's own labels; empty without a classification head."""
        head = cast(EncoderKind, self._section).class_head
        return () if head is None else head.labels

    def classify(
        self,
        images: Images,
        *,
        batch_size: int | None = None,
        channels: Channels | None = None,
        max_pixels: int | None = None,
        skipped: list[Skipped] | None = None,
    ) -> Classification:
        """Classify images by the checkpoint's own labels.

        Args:
            images: As for encode_image.
            batch_size: As for encode_image.
            channels: As for encode_image.
            max_pixels: As for encode_image.
            skipped: As for encode_image.

        Returns:
            The labels and their probabilities, (N, L); a label may occur twice.

        Raises:
            BundleError: If the model has no classification head.
            ImageError: If an image cannot be read; its path or position is named.
            InputError: If there is no image, or one of a wrong type, shape or dtype.
            BackendError: If the engine fails, or the model is closed.
        """
        head = self._head()
        logits = self._image_rows(1, images, batch_size, channels, max_pixels, skipped)
        return Classification(head.labels, activate(logits, head.activation))

    @property
    def runs(self) -> Mapping[str, Run]:
        """Classify images, where there is a head for it; else and beside it, embed."""
        if cast(EncoderKind, self._section).class_head is None:
            return super().runs
        images = frozenset({"images"})
        return {"classify": Run(self._run_classify, images, images), **super().runs}

    def _run_classify(self, given: Given, settings: Settings) -> Made:
        return self.classify(list(given.images)).named(given.images, settings.k)

    def _head(self) -> ClassHead:
        head = cast(EncoderKind, self._section).class_head
        if head is None:
            raise BundleError(
                f"{self._bundle.path}: has no classification head. Convert a checkpoint that has "
                "one, such as a ViTForImageClassification; encode_image gives embeddings."
            )
        return head
