"""Videos: frames chosen by how much the image changed.

Ten times a second a frame is compared, at 16 x 16 pixels, with the last one chosen. It is chosen
when it differs by more than `change` and has settled, that is, hardly differs from the frame
before, so that neither a blend between two shots nor motion blur is taken; or when nothing has been
chosen for `most_s` seconds. While a camera keeps moving, nothing settles, and after `moving_s` the
current frame is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.media.frames import Frame
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.video_file import decoded, decoding, open_video
from mmedge.specs import Array, Modality

__all__ = ["Choosing", "Video"]

_SIDE = 16


@dataclass(frozen=True, slots=True)
class Choosing:
    """How frames are chosen.

    Attributes:
        change: Mean difference to the last chosen frame that counts as new, in 0..1.
        settled: Difference to the frame before up to which the image stands still.
        moving_s: Seconds of change after which a frame is chosen though nothing settles.
        most_s: Longest time between two chosen frames.
        checks_per_s: Frames compared a second.
    """

    change: float = 0.06
    settled: float = 0.02
    moving_s: float = 1.0
    most_s: float = 10.0
    checks_per_s: float = 10.0


class Video(Closing):
    """The chosen frames of a video; see the module. Needs PyAV, of the extra [media].

    A frame's position is its presentation time in the stream's units; its time is known if the
    file says when it was made.

    Args:
        path: The file.
        choosing: How frames are chosen; None for the defaults.

    Raises:
        InputError: If it is no video that can be read.
    """

    def __init__(self, path: Path, choosing: Choosing | None = None) -> None:
        self._path = path
        self._choosing = choosing or Choosing()
        self._container, self._stream = open_video(path)

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self._path)

    @property
    def count(self) -> int | None:
        """Unknown before the end."""
        return None

    @property
    def started(self) -> float | None:
        """When the video begins, in seconds since 1970 (UTC); None if the file does not say."""
        made = self._container.metadata.get("creation_time", "")
        try:
            when = datetime.fromisoformat(made.replace("Z", "+00:00"))
        except ValueError:
            return None
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()

    def __iter__(self) -> Iterator[Frame]:
        """Yield the chosen frames; see FrameSource."""
        rule, started = self._choosing, self.started
        chosen: tuple[float, Array] | None = None
        before: Array | None = None
        moving_since: float | None = None
        next_check = 0.0
        for offset_s, frame in self._decoded():
            if offset_s < next_check:
                continue
            next_check = offset_s + 1 / rule.checks_per_s
            small = frame.reformat(width=_SIDE, height=_SIDE, format="rgb24", interpolation="AREA")
            seen = small.to_ndarray().astype(np.float32) / 255
            still = before is not None and _difference(seen, before) <= rule.settled
            before = seen
            if chosen is not None:
                changed = _difference(seen, chosen[1]) > rule.change
                moving_since = (moving_since or offset_s) if changed else None
                moved_s = 0.0 if moving_since is None else offset_s - moving_since
                waited = offset_s - chosen[0] >= rule.most_s
                if not (waited or (changed and (still or moved_s >= rule.moving_s))):
                    continue
            chosen, moving_since = (offset_s, seen), None
            yield Frame(
                frame.to_ndarray(format="rgb24"),
                Modality.IMAGE,
                str(self._path),
                int(frame.pts),
                None if started is None else started + offset_s,
                offset_s,
            )

    def image_at(self, position: int) -> ImageSource:
        """Return the image of a frame by its position.

        Raises:
            InputError: If there is none.
        """
        if abs(position) >= 1 << 63:
            raise InputError(f"{self._path}: has no frame at {position}.")
        with decoding(self._path):
            self._container.seek(position, stream=self._stream)
        for _, frame in self._decoded():
            if frame.pts >= position:
                image: Array = frame.to_ndarray(format="rgb24")
                return image
        raise InputError(f"{self._path}: has no frame at {position}.")

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        base = self._stream.start_time or 0
        for frame in decoded(self._path, self._container, self._stream):
            if frame.pts is not None:
                yield float((frame.pts - base) * self._stream.time_base), frame


def _difference(one: Array, other: Array) -> float:
    return float(np.abs(one - other).mean())
