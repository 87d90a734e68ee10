"""FusedModel: a head over the embeddings of encoders from other bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmedge.bundle.kinds import FusedKind
from mmedge.errors import InputError, SpaceMismatchError
from mmedge.models.base import Model
from mmedge.models.embedding import EmbeddingModel
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["FusedModel"]


class FusedModel(Model):
    """A head over embeddings, with its encoders.

    head = FusedModel.load("relations.mmedge").on(clip)
    head.predict({"image": frame, "text": "the red star is left of the blue circle"})
    """

    kind = "fused"

    _encoder: EmbeddingModel | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"_encoder": self._encoder})

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names along the last axis of the scores; empty if unnamed."""
        return self._section.labels

    def on(self, encoder: EmbeddingModel) -> FusedModel:
        """Set the encoder whose embeddings the head reads, and return the head.

        The head does not close it.

        Raises:
            SpaceMismatchError: If the head was trained on embeddings of another space.
            InputError: If the encoder lacks a modality.
        """
        for name, tap in self._section.taps.items():
            role = encoder.encoders.get(tap.modality)
            if role is None or role not in encoder.spaces:
                raise InputError(
                    f"Head input '{name}' takes {tap.modality.value} embeddings; the encoder has "
                    f"{[modality.value for modality in encoder.encoders]}."
                )
            if encoder.spaces[role] != tap.space:
                raise SpaceMismatchError(
                    f"Head input '{name}' takes embeddings of the space '{tap.space}', the "
                    f"encoder's are of '{encoder.spaces[role]}'. Load the encoder that the head "
                    "was trained on."
                )
        self._encoder = encoder
        return self

    def __call__(self, embeddings: Mapping[str, Float32Array]) -> Float32Array:
        """Return the head's first output.

        Args:
            embeddings: (N, D) float32 by input of the head.

        Raises:
            InputError: If an input is missing, unknown, or of another shape.
            BackendError: If the engine fails, or the model is closed.
        """
        outputs = self._run(self._section.head, embeddings)
        return outputs[self.manifest.roles[self._section.head].outputs[0].name]

    def predict(self, inputs: Mapping[str, Any]) -> Float32Array:
        """Encode raw inputs and return the head's first output.

        Args:
            inputs: Images or texts, as the encoder takes them, by input of the head.

        Raises:
            InputError: If no encoder is set, or an input is missing or unknown.
        """
        encoder = self._encoder
        if encoder is None:
            raise InputError("The head has no encoder. Set it with on(encoder).")
        taps = self._section.taps
        if unknown := sorted(inputs.keys() - taps.keys()):
            raise InputError(f"Unknown input '{unknown[0]}', expected {sorted(taps)}.")
        encode: dict[Modality, Callable[[Any], Array]] = {
            Modality.IMAGE: encoder.encode_image,
            Modality.TEXT: encoder.encode_text,
        }
        made: dict[str, Array] = {
            name: encode[taps[name].modality](value) for name, value in inputs.items()
        }
        return self(made)

    @property
    def _section(self) -> FusedKind:
        kind = self.manifest.kind
        assert isinstance(kind, FusedKind)  # noqa: S101, the registry's
        return kind
