"""Stamped frames, and the protocol of what yields them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from mmedge.errors import InputError
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.specs import Modality

__all__ = ["Frame", "FrameSource", "Media", "require"]

Media: TypeAlias = ImageSource | AudioSource
"""What encode_image or encode_audio of a model takes as one item."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image or sound with its time.

    Attributes:
        item: The image or sound: a path, the bytes of a file, an (H, W, 3) uint8 RGB array.
        modality: Image or audio.
        source: Where it comes from: a file's path.
        position: Place in the source, ascending and opaque; passed back to `image_at`. 0 for a
            file that is one image or sound.
        time: Seconds since 1970 (UTC); None if unknown.
        offset_s: Seconds since the beginning of the source.
    """

    item: Media = field(repr=False)
    modality: Modality
    source: str
    position: int = 0
    time: float | None = None
    offset_s: float = 0.0


class FrameSource(Protocol):
    """A sequence of frames, read once from the beginning in memory that does not grow.

    Recordings and videos yield frames by ascending position, folders by path.
    """

    @property
    def name(self) -> str:
        """The path that was opened, and the topic of a recording."""

    @property
    def count(self) -> int | None:
        """How many frames there are at most; None if that is unknown before the end."""

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames.

        Raises:
            InputError: If the source is damaged or a frame cannot be decoded.
        """

    def close(self) -> None:
        """Release the files."""


def require(package: str, what: str) -> Any:  # noqa: ANN401, a module
    """Import a module of the extra [media].

    Args:
        package: The module's name.
        what: What it reads, for the message: "Videos".

    Raises:
        InputError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{what}: the package {package.partition('.')[0]} is not installed. Install it with: "
            'pip install "mmedge[media]"'
        ) from error
