"""The bundle that an index embeds with, opened when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedge.bundle import open_bundle
from mmedge.bundle.kinds import DualEncoderKind, EmbeddingKind
from mmedge.closing import Closing
from mmedge.errors import BundleError, RetrievalError, SpaceMismatchError
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.retrieval.throughput import BulkModel, load_bulk_model
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Encoder", "Space", "bundle_space", "check_space"]


@dataclass(frozen=True, slots=True)
class Space:
    """An embedding space: its fingerprint and the length of its vectors."""

    fingerprint: str
    dim: int


def bundle_space(path: Path | str, precision: str | None = None) -> Space:
    """Return the embedding space of a bundle's encoders; nothing is loaded.

    Args:
        path: The bundle's folder.
        precision: Of the variants, as for mmedge.load.

    Raises:
        BundleError: If it is no bundle, of a kind that does not embed, or without a fingerprint of
            its vectors.
        SpaceMismatchError: If its variants of that precision do not share a space.
    """
    bundle = open_bundle(path)
    kind = bundle.manifest.kind
    if not isinstance(kind, EmbeddingKind):
        raise BundleError(
            f"{bundle.path} is a {kind.type} bundle, and an index needs a dual_encoder or an "
            "encoder. Convert a model such as CLIP, SigLIP or DINOv2."
        )
    found = {role: bundle.variant(role, precision) for role in kind.encoders.values()}
    spaces = {variant.space for variant in found.values()}
    if len(spaces) > 1:
        shown = ", ".join(f"{role} {each.name}: {each.space}" for role, each in found.items())
        raise SpaceMismatchError(
            f"{bundle.path}: its encoders do not share an embedding space ({shown}). Choose a "
            "precision whose variants do, such as precision='fp32'."
        )
    (space,) = spaces
    if space is None:
        raise BundleError(
            f"{bundle.path} has no embedding-space fingerprint. Convert it again, or make the "
            "index with dim= and pass vectors."
        )
    return Space(space, kind.embedding_dim)


def check_space(index: str | None, other: str | None, whose: str) -> None:
    """Check that vectors may be compared with those of an index.

    Args:
        index: Fingerprint of the index; None if it was made for ready vectors.
        other: Fingerprint of the vectors; None if unknown, which passes.
        whose: What has `other`, for the error.

    Raises:
        SpaceMismatchError: If both are known and differ.
    """
    if index is not None and other is not None and index != other:
        raise SpaceMismatchError(
            f"The index holds vectors of the embedding space {index}, and {whose} of {other}: "
            "they cannot be compared. Use a bundle or variant of the index's space, or re-embed "
            "the index with 'mmedge index migrate'."
        )


class Encoder(Closing):
    """A bundle's encoders, loaded when first used; safe in several threads.

    Args:
        bundle: The bundle's folder; None if there is none.
        precision: Of the variants; None for the defaults.
        backend: As for mmedge.load.
        index: The index's folder, for errors.
    """

    def __init__(
        self, bundle: str | None, precision: str | None, backend: str | None, index: Path
    ) -> None:
        self.bundle = bundle
        self.precision = precision
        self._backend = backend
        self._index = index
        self._lock = threading.Lock()
        self._model: EmbeddingModel | None = None
        self._bulk: BulkModel | None = None

    @property
    def model(self) -> EmbeddingModel:
        """The loaded bundle.

        Raises:
            RetrievalError: If the index has none, or it is not where it was.
            BundleError: If it cannot be opened.
        """
        with self._lock:
            if self._model is None:
                self._model = load_as(
                    EmbeddingModel, self._path(), precision=self.precision, backend=self._backend
                )
            return self._model

    @property
    def bulk_model(self) -> BulkModel:
        """The bundle, loaded to embed many items; raises as `model`."""
        with self._lock:
            if self._bulk is None:
                self._bulk = load_bulk_model(self._path(), self.precision, self._backend)
            return self._bulk

    def _path(self) -> str:
        if self.bundle is None:
            raise RetrievalError(
                f"{self._index} has no bundle to encode with. Pass vectors, or open it "
                "with Index.open(path, bundle=...)."
            )
        if not Path(self.bundle).is_dir():
            raise RetrievalError(
                f"{self._index}: its bundle {self.bundle} is not there. Open the index "
                "with Index.open(path, bundle=...)."
            )
        return self.bundle

    def with_bundle(self, bundle: str | None, precision: str | None) -> Encoder:
        """Return an encoder of another bundle in the same backend."""
        return Encoder(bundle, precision, self._backend, self._index)

    def images(self, images: Sequence[ImageSource] | Array) -> Float32Array:
        """Return (N, D) vectors of images; see EmbeddingModel.encode_image."""
        return self.model.encode_image(images)

    def texts(self, texts: Sequence[str]) -> Float32Array:
        """Return (N, D) vectors of texts; see EmbeddingModel.encode_text."""
        return self.model.encode_text(texts)

    def audio(self, audio: Sequence[AudioSource]) -> Float32Array:
        """Return (N, D) vectors of sounds; see EmbeddingModel.encode_audio."""
        return self.model.encode_audio(audio)

    def labels(self) -> list[str]:
        """Return the labels of the bundle's label banks."""
        kind = self.model.manifest.kind
        banks = kind.label_banks if isinstance(kind, DualEncoderKind) else {}
        return sorted({label for bank in banks.values() for label in bank})

    def space(self, modality: Modality) -> str | None:
        """Return the fingerprint of the variant that encodes a modality."""
        role = self.model.encoders.get(modality)
        return None if role is None else self.model.spaces.get(role)

    def close(self) -> None:
        """Release the models."""
        with self._lock:
            if self._model is not None:
                self._model.close()
                self._model = None
            if self._bulk is not None:
                self._bulk.model.close()
                self._bulk = None
