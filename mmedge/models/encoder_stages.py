"""Stages of an encoder's end-to-end call, for the profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from mmedge.models.base import Stages
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.registry import Processor
from mmedge.runtimes.session import Session
from mmedge.specs import Array, Modality

__all__ = ["STAGE_NAMES", "encoder_stages"]

STAGE_NAMES: Mapping[Modality | None, tuple[str, ...]] = {
    Modality.IMAGE: ("decode", "resize", "normalize", "inference"),
    Modality.TEXT: ("tokenize", "inference"),
    Modality.AUDIO: ("log-mel", "inference"),
    Modality.VIDEO: ("frames", "inference"),
}


def encoder_stages(
    whole: Callable[[], object], processor: Processor, session: Session, sample: object
) -> Stages:
    """Return an encoder's call and its stages, each with its input ready.

    Args:
        whole: The call that encodes the sample.
        processor: The encoder's.
        session: The encoder's.
        sample: One raw input of the processor's modality.
    """
    if isinstance(processor, ImageProcessor):
        return _image_stages(whole, processor, session, cast(ImageSource, sample))
    ready = _converted(processor([sample]), session)
    parts = (lambda: processor([sample]), lambda: session.run(ready))
    shapes = ", ".join(f"{name} {array.shape}" for name, array in ready.items())
    return Stages(whole, dict(zip(STAGE_NAMES[processor.modality], parts, strict=True)), shapes)


def _image_stages(
    whole: Callable[[], object], processor: ImageProcessor, session: Session, sample: ImageSource
) -> Stages:
    image = processor.decode(sample)
    frames = processor.resize(image)[None]
    ready = _converted(processor([image]), session)
    whole_size = len(processor.config.inputs) == 1
    parts = (
        lambda: processor.decode(sample),
        lambda: processor.resize(image),
        lambda: processor.normalize(frames) if whole_size else processor.cut([*frames]),
        lambda: session.run(ready),
    )
    shown = f"{image.width}x{image.height} image"
    return Stages(whole, dict(zip(STAGE_NAMES[Modality.IMAGE], parts, strict=True)), shown)


def _converted(feed: Mapping[str, Array], session: Session) -> dict[str, Array]:
    """Return a session's inputs in its graph's dtypes."""
    return {spec.name: feed[spec.name].astype(spec.dtype, copy=False) for spec in session.inputs}
