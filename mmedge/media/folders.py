"""Folders of images and sounds."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mmedge.errors import InputError
from mmedge.media.frames import Frame
from mmedge.preprocess.decode import IMAGE_SUFFIXES, image_header
from mmedge.preprocess.rgb import DAMAGED
from mmedge.specs import Modality

__all__ = ["AUDIO_SUFFIXES", "MAX_FILES", "Folder", "MediaFile", "folder_files", "taken_at"]

AUDIO_SUFFIXES = frozenset(
    {".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wave"}
)
"""Suffixes of sounds; WAV is read as it is, the others through the package soundfile."""

MAX_FILES = 10_000_000
"""A folder of more images and sounds is refused."""

# Exif: DateTimeOriginal, its fraction and its distance from UTC, in the sub-directory 0x8769.
_EXIF_IFD, _TAKEN, _FRACTION, _OFFSET = 0x8769, 0x9003, 0x9291, 0x9011
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class MediaFile:
    """An image or sound file of a folder.

    Attributes:
        path: The file, below the folder as it was given.
        name: Path relative to the folder, with forward slashes.
        modality: Image or audio, by the suffix.
        size_bytes: Size of the file.
        modified_ns: Time of its last change, nanoseconds since 1970.
    """

    path: Path
    name: str
    modality: Modality
    size_bytes: int
    modified_ns: int

    @property
    def modified(self) -> float:
        """Time of the last change in seconds since 1970."""
        return self.modified_ns / _NS


def folder_files(
    folder: Path, *, skipped: Callable[[str, str], None] | None = None
) -> Iterator[MediaFile]:
    """Yield the images and sounds below a folder, sorted by path within each of its folders.

    Hidden files and folders are left out. Linked folders are not entered. A linked file counts if
    it lies inside the folder.

    Args:
        folder: Where to look.
        skipped: Takes the path and the reason for each image or sound that is not yielded.

    Raises:
        InputError: If it is not a folder that can be read, or holds more than MAX_FILES files.
    """
    skipped = skipped or (lambda _path, _reason: None)
    try:
        root = folder.resolve(strict=True)
        if not root.is_dir():
            raise InputError(f"{folder}: got a file, expected a folder of images or sounds.")
        os.scandir(root).close()
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: cannot be read ({reason}). Check the path.") from error
    count = 0

    def unreadable(error: OSError) -> None:
        skipped(str(error.filename), f"cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            found = _media_file(folder, root, Path(parent, name), skipped)
            if found is not None:
                count += 1
                if count > MAX_FILES:
                    raise InputError(
                        f"{folder}: more than {MAX_FILES} images and sounds. Pass its folders one "
                        "by one."
                    )
                yield found


def _media_file(
    folder: Path, root: Path, path: Path, skipped: Callable[[str, str], None]
) -> MediaFile | None:
    suffix = path.suffix.lower()
    modality = (
        Modality.IMAGE
        if suffix in IMAGE_SUFFIXES
        else Modality.AUDIO
        if suffix in AUDIO_SUFFIXES
        else None
    )
    if modality is None or path.name.startswith("."):
        return None
    name = path.relative_to(folder).as_posix()
    try:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            skipped(str(path), "a link that leads out of the folder")
            return None
        status = path.stat()
        name.encode()
    except UnicodeEncodeError:
        skipped(str(path), "its name is not UTF-8; rename it")
        return None
    except OSError as error:
        skipped(str(path), f"cannot be read ({error.strerror})")
        return None
    if not stat.S_ISREG(status.st_mode):
        skipped(str(path), "not a regular file")
        return None
    return MediaFile(path, name, modality, status.st_size, status.st_mtime_ns)


def taken_at(path: Path) -> float | None:
    """Return the time at which a photo was taken, from its EXIF data.

    A time without its distance from UTC is taken as this machine's local time.

    Returns:
        Seconds since 1970 (UTC); None if the file has no such time or cannot be read.
    """
    try:
        with path.open("rb") as file, image_header(file, str(path)) as image:
            if image.format == "PNG" and "exif" not in image.info:
                return None  # Pillow would decode the whole image to look for it
            exif = image.getexif().get_ifd(_EXIF_IFD)
    except (InputError, *DAMAGED):
        return None
    return _exif_time(
        *(str(exif.get(tag, "")).strip("\0 ") for tag in (_TAKEN, _FRACTION, _OFFSET))
    )


def _exif_time(taken: str, fraction: str, offset: str) -> float | None:
    try:
        when = datetime.strptime(taken, "%Y:%m:%d %H:%M:%S")
        if offset:
            zone = "+00:00" if offset == "Z" else offset
            when = datetime.strptime(f"{taken} {zone}", "%Y:%m:%d %H:%M:%S %z")
        seconds = when.timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return seconds + (float(f"0.{fraction}") if fraction.isdecimal() else 0.0)


class Folder:
    """The images and sounds of a folder, as frames.

    Args:
        folder: Where to look; see folder_files.
        skipped: Takes the path and the reason for each file that is not yielded.
    """

    def __init__(self, folder: Path, *, skipped: Callable[[str, str], None] | None = None) -> None:
        self._folder = folder
        self._skipped = skipped

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self._folder)

    @property
    def count(self) -> int | None:
        """Unknown before the end."""
        return None

    def __iter__(self) -> Iterator[Frame]:
        """Yield a frame a file: the time from EXIF, else the file's."""
        for file in folder_files(self._folder, skipped=self._skipped):
            taken = taken_at(file.path) if file.modality is Modality.IMAGE else None
            time = file.modified if taken is None else taken
            yield Frame(file.path, file.modality, str(file.path), time=time)

    def close(self) -> None:
        """Nothing stays open between frames."""
