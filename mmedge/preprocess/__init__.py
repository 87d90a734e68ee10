"""Preprocessing of images, texts, audio, vectors and videos, equal to the reference processors."""

from mmedge.preprocess.camera import RawFrame
from mmedge.preprocess.config import (
    AudioConfig,
    ImageConfig,
    ProcessorConfig,
    TextConfig,
    VectorConfig,
    VideoConfig,
)
from mmedge.preprocess.decode import (
    MAX_PIXELS,
    ImageOptions,
    ImageSource,
    decode_image,
    image_files,
)
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.registry import Processor, open_processor
from mmedge.preprocess.text import MAX_TEXT_BYTES, TextProcessor

__all__ = [
    "MAX_PIXELS",
    "MAX_TEXT_BYTES",
    "AudioConfig",
    "ImageConfig",
    "ImageOptions",
    "ImageProcessor",
    "ImageSource",
    "Processor",
    "ProcessorConfig",
    "RawFrame",
    "TextConfig",
    "TextProcessor",
    "VectorConfig",
    "VideoConfig",
    "decode_image",
    "image_files",
    "open_processor",
]
