"""The frames of videos and recordings that a search found."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.media.recordings import Recording
from mmedge.media.video import Video
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.video_file import VIDEO_SUFFIXES
from mmedge.retrieval.items import Match

__all__ = ["HitFrames"]


class HitFrames(Closing):
    """Reads the frames of hits; a video or recording stays open for the next hit in it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: dict[tuple[str, str | None], Recording | Video] = {}

    def read(self, match: Match) -> ImageSource | None:
        """Return the frame that a hit is.

        Args:
            match: A hit in what index_recording or index_video added.

        Returns:
            Its frame; None for a hit that is none.

        Raises:
            InputError: If the file is gone or damaged, or the extra [media] is not installed.
        """
        topic, position = match.metadata.get("topic"), match.metadata.get("position")
        positions = match.metadata.get("positions")
        if match.source is None:
            return None
        if isinstance(topic, str) and isinstance(position, int):
            return self._open(match.source, topic).image_at(position)
        video = Path(match.source).suffix.lower() in VIDEO_SUFFIXES
        if video and isinstance(positions, list) and 0 <= match.part < len(positions):
            try:
                position = int(positions[match.part])
            except (ValueError, TypeError, OverflowError) as error:  # the index of a stranger
                raise InputError(
                    f"{match.id}: got {positions[match.part]!r} as the position of a frame, "
                    "expected an integer. Add the video again."
                ) from error
            return self._open(match.source, None).image_at(position)
        return None

    def close(self) -> None:
        """Close all files."""
        self._opened.clear()
        self._stack.close()

    def _open(self, source: str, topic: str | None) -> Recording | Video:
        if (source, topic) not in self._opened:
            path = Path(source)
            opened: Recording | Video = Video(path) if topic is None else Recording(path, topic)
            self._stack.callback(opened.close)
            self._opened[source, topic] = opened
        return self._opened[source, topic]
