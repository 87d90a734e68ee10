"""Thumbnails of the images that an index names, from the folders that may be shown."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmedge.errors import ImageError
from mmedge.preprocess.decode import IMAGE_SUFFIXES, decode_image

__all__ = ["SourceFolders", "Thumbnails"]

_MAX_FILE_BYTES = 256 << 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class SourceFolders:
    """Folders whose images may be shown.

    Args:
        folders: The folders, symbolic links resolved once, here.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))

    def shows(self, source: str | None) -> bool:
        """Return whether a source may have an image to show, by its name alone."""
        return source is not None and Path(source).suffix.lower() in IMAGE_SUFFIXES

    def open(self, source: str) -> io.BufferedReader:
        """Open an image file that an index names.

        Symbolic links are resolved and the result must lie in one of the folders; it is then
        opened folder by folder without following links, so that a link which is put there
        meanwhile is not followed either.

        Args:
            source: An absolute path.

        Raises:
            ImageError: If the source is not a regular file in one of the folders. The message has
                no path and is the same for a file that is elsewhere and for one that is missing.
        """
        absent = ImageError(
            "This item has no image to show: its source is missing, is not an image file, or lies "
            "outside the folders given with --root."
        )
        if not self.shows(source) or not os.path.isabs(source):  # noqa: PTH117
            raise absent
        try:
            path = Path(os.path.realpath(source, strict=True))
            inside = next((each for each in self.folders if path.is_relative_to(each)), None)
            if inside is None:
                raise absent
            descriptor = _open_below(inside, path.relative_to(inside).parts)
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise absent from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
            os.close(descriptor)
            raise absent
        return os.fdopen(descriptor, "rb")


def _open_below(folder: Path, parts: Sequence[str]) -> int:
    """Open a file below a folder without following symbolic links; return its descriptor.

    Raises:
        OSError: If it cannot be opened, or a part of the path is a link.
    """
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(parts[-1] if parts else ".", _FILE_FLAGS, dir_fd=at)
    finally:
        os.close(at)


class Thumbnails:
    """JPEG thumbnails of sources, the latest kept in memory.

    May be used from several threads at once.

    Args:
        folders: Folders whose images may be shown.
        limit_bytes: Memory for thumbnails that are kept.
    """

    def __init__(self, folders: SourceFolders, limit_bytes: int = 64 << 20) -> None:
        self._folders, self._limit_bytes = folders, limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int, int], bytes] = OrderedDict()
        self._size_bytes = 0

    def get(self, source: str, side: int) -> bytes:
        """Return a thumbnail, re-encoded without the metadata of its source, as JPEG.

        Args:
            source: An absolute path that the index names.
            side: Longest side in pixels; a smaller image keeps its size.

        Raises:
            ImageError: If the source may not be shown, or is damaged or too large.
        """
        with self._folders.open(source) as file:
            status = os.fstat(file.fileno())
            key = (source, status.st_mtime_ns, status.st_size, side)
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            data = _thumbnail(file, side)
        self._keep(key, data)
        return data

    def _keep(self, key: tuple[str, int, int, int], data: bytes) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._size_bytes += len(data)
            while self._size_bytes > self._limit_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._size_bytes -= len(oldest)


def _thumbnail(file: io.BufferedReader, side: int) -> bytes:
    image = decode_image(file, least_side=side, shrink=True)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    image.info.clear()  # a comment would be written again
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()
