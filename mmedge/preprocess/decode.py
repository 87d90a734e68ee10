"""Image decoding to upright RGB."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, TypeGuard, get_args

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from mmedge.errors import ImageError, InputError
from mmedge.preprocess.binary import BinaryFile, seekable
from mmedge.preprocess.camera import RawFrame
from mmedge.preprocess.rgb import DAMAGED, Channels, array_to_rgb, to_rgb
from mmedge.preprocess.steps import Alpha
from mmedge.specs import Array

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Channels",
    "ImageOptions",
    "ImageSource",
    "array_of",
    "decode_image",
    "describe_source",
    "frame_size",
    "image_files",
    "image_header",
    "is_image_source",
]


class _ArrayLike(Protocol):
    def __array__(self) -> Array: ...


ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryFile
    | Image.Image
    | RawFrame
    | Array
    | _ArrayLike
)
"""A path, the bytes of an image file, a binary file object, a PIL image, a camera's RawFrame, or a
uint8 array or CPU tensor (height, width, channels)."""

_Reader: TypeAlias = tuple[
    Callable[[IO[bytes], str | bytes], ImageFile.ImageFile],
    Callable[[bytes], bool | str] | None,
]

MAX_PIXELS = 89_478_485
"""Default limit on width x height: 256 MiB of RGB, the size at which Pillow begins to warn."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"}
    | {".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes that `image_files` selects; the format is detected from the first bytes."""

# Formats by the module that reads them. Some formats of Pillow are left out: some run an external
# program (EPS), and devices need none of them. The first group is imported with Pillow itself.
_COMMON = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "BMP": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "PPM": "PpmImagePlugin",
}
_FURTHER = {
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}
_FRAME = "mmedge_frame_size"  # key in Image.info
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Image options of the caller.

    Attributes:
        channels: Order in arrays: `rgb`, or `bgr` for frames of OpenCV. Files and PIL images know
            theirs.
        alpha: `white` composites transparent pixels onto white, `drop` ignores the alpha channel;
            None keeps the bundle's setting.
        max_pixels: Images of more pixels are refused before they are decoded. A larger JPEG that
            is to be scaled down is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        InputError: If a value is unknown or out of range.
    """

    channels: Channels = "rgb"
    alpha: Alpha | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.channels not in get_args(Channels):
            raise InputError(f"channels: got {self.channels!r}, expected 'rgb' or 'bgr'.")
        if self.alpha not in (None, *get_args(Alpha)):
            raise InputError(f"alpha: got {self.alpha!r}, expected 'white' or 'drop'.")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels: got {self.max_pixels}, expected 1 or more.")


def decode_image(
    source: ImageSource,
    options: ImageOptions | None = None,
    *,
    alpha: Alpha = "white",
    least_side: int = 0,
    shrink: bool = False,
) -> Image.Image:
    """Return an image as an upright RGB image.

    Of an animation the first frame is taken. The EXIF orientation is applied to files and bytes; a
    PIL image is used unchanged. An RGB image is returned as it is, not copied. See to_rgb for
    greyscale of more than 8 bits.

    Args:
        source: Path; bytes of an image file; binary file object, read from its beginning; PIL
            image; RawFrame; uint8 array or CPU tensor (H, W, 3), (H, W, 4), (H, W) or (H, W, 1).
        options: Image options of the caller.
        alpha: What to do with transparent pixels where the options do not say.
        least_side: Shortest side that is enough, so that a JPEG above max_pixels may be decoded
            at a fraction of its size; 0 for none.
        shrink: Do so with every JPEG that is large enough, as a thumbnail wants.

    Raises:
        ImageError: If the source is missing, not an image, damaged or too large; it is named.
        ShapeError: If an array has another shape.
        DTypeError: If an array is not uint8.
        InputError: If the source is of another type.
    """
    options = options or ImageOptions()
    alpha = options.alpha or alpha
    array = array_of(source)
    if isinstance(array, np.ndarray):
        return array_to_rgb(array, options.channels, alpha, describe_source(array))
    if isinstance(source, RawFrame):
        return source.to_rgb()
    name = describe_source(source)

    def read(file: IO[bytes], *, upright: bool = True) -> Image.Image:
        bound = partial(
            _bound, max_pixels=options.max_pixels, least_side=least_side, shrink=shrink, name=name
        )
        return _read(file, name, bound, alpha, upright=upright)

    if isinstance(source, Image.Image):
        if isinstance(source, ImageFile.ImageFile) and source.tile and _is_open(source.fp):
            width, height = source.size
            if width * height > options.max_pixels:  # reopen: keep the caller's image
                return read(source.fp, upright=False)
        return to_rgb(_loaded(source, name), alpha, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise ImageError(f"{name}: got no bytes. Check their source.")
        return read(io.BytesIO(source))
    if isinstance(source, (str, os.PathLike)):
        path = _checked_path(source)
        try:
            with path.open("rb") as file:
                return read(file)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error}).") from error
    if hasattr(source, "read"):
        return read(seekable(source, name, ImageError))
    raise InputError(
        f"{name}: not an image. Pass a path, the bytes of an image file, a binary file object, a "
        "PIL image, a RawFrame, or a uint8 array of (height, width, 3)."
    )


def frame_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of the frame that an image of decode_image shows.

    It is larger than the image where a JPEG was decoded at a fraction of its size.
    """
    size: tuple[int, int] = image.info.get(_FRAME, image.size)
    return size


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, by suffix, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def array_of(source: Any) -> Any:  # noqa: ANN401, whatever a caller passes
    """Return the numpy array of a tensor or another array-like; anything else as it is.

    Raises:
        InputError: If it cannot be read from the CPU, such as a tensor on a GPU.
    """
    plain = (np.ndarray, str, bytes, os.PathLike, Image.Image)
    if isinstance(source, plain) or not hasattr(source, "__array__"):
        return source
    try:
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{type(source).__name__}: cannot be read as an array ({error}). Pass "
            "tensor.detach().cpu()."
        ) from error


def is_image_source(source: object) -> TypeGuard[ImageSource]:
    """Return whether a non-array object is one image, not several."""
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, RawFrame)
    return isinstance(source, kinds) or hasattr(source, "read")


def describe_source(source: object) -> str:
    """Return a short name of an image for messages: its path or type."""
    if isinstance(source, (str, os.PathLike)):
        return f"Image '{os.fspath(source)}'"
    file_name = getattr(source, "name", None) if hasattr(source, "read") else None
    if isinstance(file_name, str):
        return f"Image '{file_name}'"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"Image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        opened = getattr(source, "filename", "")
        return f"Image '{opened}'" if opened else f"PIL image {source.width}x{source.height}"
    if isinstance(source, np.ndarray):
        return f"Image array {source.shape}"
    return f"Image of type {type(source).__name__}"


def _checked_path(source: str | os.PathLike[str]) -> Path:
    name = describe_source(source)
    if not os.fspath(source):
        raise ImageError(f"{name}: the path is empty. Pass the path of an image file.")
    if str(source).startswith(("http://", "https://")):
        raise ImageError(f"{name}: addresses are not fetched. Download it and pass the path.")
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(
                f"{name}: is a folder. Pass it to encode_image_files, or its files one by one."
            )
        if not path.exists():
            raise ImageError(f"{name}: no such file. Check the path.")
        if not path.is_file():
            raise ImageError(f"{name}: not a regular file. Read it and pass its bytes.")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty. Fetch or write it again.")
    except (OSError, ValueError) as error:  # unreadable folder, name too long, NUL in the name
        raise ImageError(f"{name}: cannot be read ({error}).") from error
    return path


def _is_open(file: IO[bytes] | None) -> TypeGuard[IO[bytes]]:
    return file is not None and not file.closed


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels of an opened PIL image."""
    try:
        image.load()
    except DAMAGED as error:
        if isinstance(image, ImageFile.ImageFile) and not _is_open(image.fp):
            raise ImageError(
                f"{name}: its file was closed before it was read. Call image.load() while it is "
                "open, or pass the path."
            ) from error
        raise ImageError(f"{name}: damaged, truncated or closed ({error}).") from error
    return image


def _read(
    file: IO[bytes],
    name: str,
    bound: Callable[[ImageFile.ImageFile], None],
    alpha: Alpha,
    *,
    upright: bool,
) -> Image.Image:
    image = image_header(file, name)
    with image:
        frame = image.size
        bound(image)
        decoded = image.size
        try:
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
        except DAMAGED as error:
            raise ImageError(
                f"{name}: damaged or truncated ({error}). Fetch or write it again."
            ) from error
        shown = to_rgb(image, alpha, name)
        if decoded != frame:
            shown.info[_FRAME] = frame if image.size == decoded else frame[::-1]
        return shown


def image_header(file: IO[bytes], name: str) -> ImageFile.ImageFile:
    """Read the header of an image file.

    `Image.open` would warn of, or refuse, a large image by a limit that belongs to the process;
    asking the readers directly leaves the limit to us and the process's warnings alone.
    """
    file.seek(0)
    prefix = file.read(16)
    reasons = []
    for image_format, (factory, accepts) in _readers():
        accepted = not accepts or _accepts(accepts, prefix)
        if isinstance(accepted, str):  # known, but unsupported by this build of Pillow
            reasons.append(accepted)
        elif accepted:
            file.seek(0)
            try:
                return factory(file, "")
            except DAMAGED as error:
                reasons.append(f"{image_format}: {error}")
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        reasons.append("HEIF: install pillow-heif and call pillow_heif.register_heif_opener()")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise ImageError(
        f"{name}: not an image that can be read{why}. Expected one of "
        f"{', '.join([*_COMMON, *_FURTHER])} or a format registered with Pillow; open "
        "others yourself and pass the PIL image."
    )


def _accepts(accepts: Callable[[bytes], bool | str], prefix: bytes) -> bool | str:
    try:
        return accepts(prefix)
    except IndexError:  # readers of Pillow 11.0 take no file of a few bytes
        return False


def _readers() -> Iterator[tuple[str, _Reader]]:
    """Yield Pillow's (factory, accepts) by format: ours, then formats registered by the program."""
    for image_format, module in (*_COMMON.items(), *_FURTHER.items()):
        if image_format not in Image.OPEN:
            try:
                importlib.import_module(f"PIL.{module}")
            except ImportError:
                continue
        if image_format in Image.OPEN:
            yield image_format, Image.OPEN[image_format]
    for image_format, reader in list(Image.OPEN.items()):
        own = getattr(reader[0], "__module__", "").startswith("PIL.")
        if not own and image_format not in (*_COMMON, *_FURTHER):
            yield image_format, reader


def _bound(
    image: ImageFile.ImageFile, *, max_pixels: int, least_side: int, shrink: bool, name: str
) -> None:
    """Reject an image that is too large, or decode a JPEG at a fraction of its size."""
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width}x{height}).")
    within = width * height <= max_pixels
    # A progressive JPEG keeps all its coefficients in memory at any output size.
    allowed = shrink if within else "progressive" not in image.info
    if isinstance(image, JpegImageFile) and least_side and allowed:
        for part in (8, 4, 2):
            size = width // part, height // part
            if min(size) >= least_side and size[0] * size[1] <= max_pixels:
                image.draft(image.mode, size)
                return
    if within:
        return
    raise ImageError(
        f"{name}: {width}x{height} pixels, more than the {max_pixels} allowed. Raise max_pixels of "
        "load or encode_image if you trust its source, or scale it down first."
    )
