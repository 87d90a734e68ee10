"""DualEncoder: images, texts and audio in one embedding space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import numpy as np

from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.kinds.embedding import EMBEDDING
from mmedge.errors import BundleError, DTypeError, InputError, ShapeError, SpaceMismatchError
from mmedge.models.classification import (
    DEFAULT_TEMPLATE,
    Classification,
    EmbeddingCache,
    label_prompts,
    probabilities,
)
from mmedge.models.embedding import EmbeddingModel, Images, Texts
from mmedge.models.features import Features
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["DualEncoder"]


class DualEncoder(EmbeddingModel):
    """Encoders of two modalities, or one, into one embedding space, ready to run.

    Made by `mmedge.load`. Cached label embeddings are behind a lock, so every method may be called
    from several threads at once.
    """

    kind = "dual_encoder"

    @cached_property
    def _prompt_embeddings(self) -> EmbeddingCache:
        return EmbeddingCache()

    @property
    def _section(self) -> DualEncoderKind:
        kind = self.manifest.kind
        assert isinstance(kind, DualEncoderKind)  # noqa: S101, the registry's
        return kind

    def similarity(
        self, images: Images | Features, texts: Texts | Float32Array | Features
    ) -> Float32Array:
        """Return the cosine similarity of every image with every text.

        Args:
            images: Images, their features, or their embeddings (N, D) float32 from encode_image.
            texts: Texts, their features, or their embeddings (M, D) float32 from encode_text.

        Returns:
            (N, M) float32 in [-1, 1].

        Raises:
            InputError: As for encode_image and encode_text, and if embeddings have another D.
            SpaceMismatchError: If features are of another encoder.
        """
        similarities: Float32Array = self._image_embeddings(images) @ self._text_embeddings(texts).T
        return similarities

    def classify(
        self,
        images: Images | Features,
        labels: Sequence[str] | str,
        *,
        template: str = DEFAULT_TEMPLATE,
    ) -> Classification:
        """Classify images by labels, zero-shot.

        The embeddings of the last 8 sets of labels are cached.

        Args:
            images: Images, their features, or their embeddings (N, D) float32 from encode_image.
            labels: L labels, or the name of one of the bundle's label banks.
            template: The text that is encoded for a label, "{}" standing for it.

        Returns:
            The labels and their probabilities, (N, L).

        Raises:
            InputError: As for encode_image and encode_text, if a label is empty or given twice, if
                there is no such label bank, or the template has no "{}".
            SpaceMismatchError: If features are of another encoder.
            BundleError: If the bundle has no contrastive head.
        """
        head = self._section.contrastive_head
        if head is None:
            raise BundleError(
                f"{self._bundle.path}: has no contrastive head, so its similarities cannot be "
                "turned into probabilities. Use similarity."
            )
        chosen = self._label_bank(labels) if isinstance(labels, str) else tuple(labels)
        prompts = label_prompts(chosen, template)
        label_embeddings = self._prompt_embeddings.get(prompts, self.encode_text)
        similarities = self._image_embeddings(images) @ label_embeddings.T
        return Classification(chosen, probabilities(similarities, head))

    @property
    def runs(self) -> Mapping[str, Run]:
        """Classify images by texts, where there is a head for it; else and beside it, embed."""
        both = frozenset({"images", "texts"})
        if self._section.contrastive_head is None or len(self.sessions) < len(both):
            return super().runs
        return {"classify": Run(self._run_classify, both, both), **super().runs}

    def _run_classify(self, given: Given, settings: Settings) -> Made:
        found = self.classify(list(given.images), list(given.texts), template="{}")
        return found.named(given.images, settings.k)

    def _image_embeddings(self, images: Images | Features) -> Float32Array:
        if isinstance(images, Features):
            return self._features_embeddings(images, Modality.IMAGE)
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim < 3:
            return self._checked_embeddings(images)
        return self.encode_image(images)

    def _features_embeddings(self, features: Features, modality: Modality) -> Float32Array:
        expected = self.spaces.get(self._role(modality))
        got = features.spaces.get(EMBEDDING)
        if features.modality is not modality or got != expected:
            raise SpaceMismatchError(
                f"Features: got {features.modality.value} features of '{got}', expected "
                f"{modality.value} features of '{expected}'. Extract them with this model."
            )
        return features.embedding

    def _text_embeddings(self, texts: Texts | Float32Array | Features) -> Float32Array:
        if isinstance(texts, Features):
            return self._features_embeddings(texts, Modality.TEXT)
        if isinstance(texts, np.ndarray) and texts.dtype.kind not in "OU":
            return self._checked_embeddings(texts)
        return self.encode_text(cast(Texts, texts))

    def _checked_embeddings(self, embeddings: Array) -> Float32Array:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ShapeError(
                f"Embeddings: got {embeddings.shape}, expected (batch, {self.embedding_dim}). "
                "Pass what encode_image or encode_text of this model returned."
            )
        if embeddings.dtype != np.float32:
            raise DTypeError(f"Embeddings: got dtype {embeddings.dtype.name}, expected float32.")
        return embeddings

    def _label_bank(self, name: str) -> tuple[str, ...]:
        banks = self._section.label_banks
        if name not in banks:
            raise InputError(
                f"Labels: '{name}' is not a label bank of this bundle, which has {sorted(banks)}. "
                "Pass a list of labels."
            )
        return banks[name]
