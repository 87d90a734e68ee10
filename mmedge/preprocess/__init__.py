"""From pictures and texts to tensors, in numpy and Pillow: equal to the reference processors."""

from mmedge.preprocess.config import ImagePreprocessing, Preprocessing, Resize, TextPreprocessing
from mmedge.preprocess.decode import MAX_PIXELS, ImageSource, decode_image
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import MAX_TEXT_BYTES, TextProcessor

__all__ = [
    "MAX_PIXELS",
    "MAX_TEXT_BYTES",
    "ImagePreprocessing",
    "ImageProcessor",
    "ImageSource",
    "Preprocessing",
    "Resize",
    "TextPreprocessing",
    "TextProcessor",
    "decode_image",
]
