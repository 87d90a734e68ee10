"""FusedModel: a head over the taps of encoders from other bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedge.bundle.kinds import FusedKind
from mmedge.bundle.opening import open_bundle
from mmedge.errors import BundleError, InputError
from mmedge.models.base import Model
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.heads import Given, Head, HeadOutput, check_binding, learned_defaults

if TYPE_CHECKING:
    from mmedge.runtimes.session import SessionOptions

__all__ = ["FusedModel", "load_head"]


class FusedModel(Model):
    """A head in a bundle of its own.

    rel = mmedge.load_head("relations.mmedge", on=clip)
    rel(clip.extract(frame), "the red star is left of the blue circle").scores
    """

    kind = "fused"

    _head: Head | None = None
    _encoders: tuple[EmbeddingModel, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"_encoders": self._encoders})

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names along the last axis of the scores; empty if unnamed."""
        return self._section.head.labels

    def on(self, *encoders: EmbeddingModel) -> FusedModel:
        """Set the encoders whose taps the head reads, and return the head.

        The head does not close them.

        Raises:
            SpaceMismatchError: If a tap is of another encoder, preprocessing or place.
            InputError: If no encoder is of a modality that the head reads.
        """
        check_binding(self.manifest.name, self._section.head, encoders)
        self._encoders, self._head = encoders, None
        return self

    @property
    def head(self) -> Head:
        """The head, bound to its encoders."""
        if self._head is None:
            section = self._section
            self._head = Head(
                self.manifest.name,
                section.head,
                self.manifest.roles[section.role],
                lambda feed: self._run(section.role, feed),
                learned_defaults(self._bundle, section.head, section.role),
                self._encoders,
            )
        return self._head

    def __call__(self, *given: Given) -> HeadOutput:
        """Run the head; see Head.

        Raises:
            SpaceMismatchError: If features are of another encoder, tap or preprocessing.
            InputError: If an input is missing, unknown, too old or of another shape.
            BackendError: If the engine fails, or the model is closed.
        """
        return self.head(*given)

    @property
    def _section(self) -> FusedKind:
        kind = self.manifest.kind
        assert isinstance(kind, FusedKind)  # noqa: S101, the registry's
        return kind


def load_head(
    path: Path | str,
    *,
    on: EmbeddingModel | Sequence[EmbeddingModel],
    device: str | None = None,
    precision: str | None = None,
    backend: str | None = None,
    options: SessionOptions | None = None,
) -> FusedModel:
    """Load a head and bind it to the encoders that it was trained on.

    Args:
        path: The head's bundle.
        on: The encoder, or several where the head reads more than one.
        device: As for mmedge.load.
        precision: As for mmedge.load.
        backend: As for mmedge.load.
        options: As for mmedge.load.

    Returns:
        The head. Close it, or use it in a `with` block; the encoders stay open.

    Raises:
        SpaceMismatchError: If a tap that it reads is of another encoder, preprocessing or place.
            Nothing has run then.
        BundleError: If the bundle cannot be opened or trusted, or is no head.
        InputError: If no encoder is of a modality that the head reads.
        BackendError: If the backend or the device is missing.
    """
    encoders = tuple(on) if isinstance(on, list | tuple) else (on,)
    if not all(isinstance(each, EmbeddingModel) for each in encoders) or not encoders:
        got = [type(each).__name__ for each in encoders]
        raise InputError(
            f"load_head: on= got {got}, expected an encoder from mmedge.load, or several."
        )
    bundle = open_bundle(path)
    kind = bundle.manifest.kind
    if not isinstance(kind, FusedKind):
        raise BundleError(f"{bundle.path} is a {kind.type} bundle, no head. Use mmedge.load.")
    check_binding(bundle.manifest.name, kind.head, encoders)
    model = FusedModel.load(
        path, device=device, precision=precision, backend=backend, options=options
    )
    return model.on(*encoders)
