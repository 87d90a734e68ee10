"""DualEncoder: images, texts, audio and videos in one embedding space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import cast

import numpy as np

from mmedge.bundle.kinds import ContrastiveHead, DualEncoderKind
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
from mmedge.preprocess.video import VideoSource
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

    @cached_property
    def _projected_prompts(self) -> EmbeddingCache:
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
        head, (chosen, prompts) = self._head(), self._prompts(labels, template)
        label_embeddings = self._prompt_embeddings.get(prompts, self.encode_text)
        similarities = self._image_embeddings(images) @ label_embeddings.T
        return Classification(chosen, probabilities(similarities, head))

    def classify_video(
        self,
        videos: VideoSource | Iterable[VideoSource],
        labels: Sequence[str] | str,
        *,
        template: str = "{}",
        batch_size: int | None = None,
    ) -> Classification:
        """Classify videos by labels, zero-shot.

        A model with a prompter (X-CLIP) adapts the labels' embeddings to each video first, so that
        its scores are not those of encode_video and encode_text.

        Args:
            videos: As for encode_video.
            labels: L labels, or the name of one of the bundle's label banks.
            template: The text that is encoded for a label, "{}" standing for it.
            batch_size: Videos that run through the graph at once; None takes the bundle's own.

        Returns:
            The labels and their probabilities, (N, L).

        Raises:
            InputError: As for encode_video and classify.
            BundleError: If the bundle has no contrastive head.
        """
        head, (chosen, prompts) = self._head(), self._prompts(labels, template)
        name, prompter = self._output_name(Modality.VIDEO), self._section.prompter
        if prompter is None:
            rows = self._prompt_embeddings.get(prompts, self.encode_text)
        else:
            outputs = self.manifest.roles[self._role(Modality.TEXT)].outputs
            output = [entry.name for entry in outputs].index("projected")
            rows = self._projected_prompts.get(prompts, partial(self._text_rows, output))
        parts = []
        for made in self._video_outputs(videos, batch_size):
            videos_now = made[name].astype(np.float32, copy=False)
            if prompter is None:
                parts.append(videos_now @ rows.T)
            else:
                texts = self._prompted(prompter, rows, made["context"])
                parts.append(np.einsum("nd,nld->nl", videos_now, texts))
        return Classification(chosen, probabilities(np.concatenate(parts), head))

    def _prompted(self, prompter: str, rows: Float32Array, context: Array) -> Float32Array:
        """Return labels' embeddings for each video, (N, L, D), from rows (L, D)."""
        name = self.manifest.roles[prompter].outputs[0].name
        size = self.manifest.roles[prompter].axes["labels"].max
        parts = [
            self._run(prompter, {"projected": rows[start : start + size], "context": context})
            for start in range(0, len(rows), size)
        ]
        return np.concatenate([part[name] for part in parts], axis=1).astype(np.float32, copy=False)

    def _head(self) -> ContrastiveHead:
        head = self._section.contrastive_head
        if head is None:
            raise BundleError(
                f"{self._bundle.path}: has no contrastive head, so its similarities cannot be "
                "turned into probabilities. Use similarity."
            )
        return head

    def _prompts(
        self, labels: Sequence[str] | str, template: str
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return labels, and the texts that are encoded for them."""
        chosen = self._label_bank(labels) if isinstance(labels, str) else tuple(labels)
        return chosen, label_prompts(chosen, template)

    @property
    def runs(self) -> Mapping[str, Run]:
        """Classify images or videos by texts, where there is a head for it; else embed."""
        item = "videos" if Modality.VIDEO in self.encoders else "images"
        both = frozenset({item, "texts"})
        if self._section.contrastive_head is None or len(self.taps) < len(both):
            return super().runs
        return {"classify": Run(self._run_classify, both, both), **super().runs}

    def _run_classify(self, given: Given, settings: Settings) -> Made:
        if given.videos:
            found = self.classify_video(list(given.videos), list(given.texts))
            return found.named(given.videos, settings.k)
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
