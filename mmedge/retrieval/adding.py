"""From what a caller adds to items that can be written."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from mmedge.errors import InputError
from mmedge.files import sha256_file
from mmedge.models.images import image_sources
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource, is_audio_source
from mmedge.retrieval.embedding import Encoder, check_space
from mmedge.retrieval.inputs import Vectors, checked_vectors
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Content", "Given", "as_list", "encoded", "new_id"]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What an item is made from, as the caller gave it; one of the first three, or texts alone.

    Attributes:
        images: Images, as for EmbeddingModel.encode_image.
        audio: Sounds, as for EmbeddingModel.encode_audio.
        vectors: Ready vectors.
        texts: Words; embedded where nothing else is given.
    """

    images: ImageSource | Iterable[ImageSource] | None = None
    audio: AudioSource | Iterable[AudioSource] | None = None
    vectors: Vectors | None = None
    texts: str | Sequence[str | None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Encoded items.

    Attributes:
        vectors: (V, D) float32 of each item, L2-normalised.
        sources: The path of each that came from a file.
        hashes: sha256 of each one's file or bytes.
        modality: What they were encoded from; None for ready vectors.
        space: Fingerprint of the variant that encoded them; None for ready vectors.
    """

    vectors: list[Float32Array]
    sources: list[str | None]
    hashes: list[str | None]
    modality: Modality | None
    space: str | None


def encoded(
    given: Given, encoder: Encoder, dim: int, space: str | None, *, hashed: bool = True
) -> Content:
    """Encode what a caller gave.

    Args:
        given: One of images, audio, vectors, or texts alone.
        encoder: Encodes all but ready vectors.
        dim: D of the index.
        space: Fingerprint of the index.
        hashed: Whether content hashes are made.

    Raises:
        InputError: If nothing is given or several, or one of them cannot be used.
        SpaceMismatchError: If the encoder's space is not the index's.
    """
    named = {"images": given.images, "audio": given.audio, "vectors": given.vectors}
    several = [name for name, value in named.items() if value is not None]
    if len(several) > 1:
        raise InputError(f"add: got {' and '.join(several)}, expected one of them. Add in turn.")
    if given.vectors is not None:
        vectors = checked_vectors(given.vectors, dim)
        nothing: list[str | None] = [None] * len(vectors)
        return Content(vectors, nothing, nothing, None, None)
    sources: Sequence[object] | Array
    if given.images is not None:
        modality, images = Modality.IMAGE, as_list(given.images)
        sources, encode = images, partial(encoder.images, images)
    elif given.audio is not None:
        one = [given.audio] if is_audio_source(given.audio) else given.audio
        modality, sounds = Modality.AUDIO, list(cast("Iterable[AudioSource]", one))
        sources, encode = sounds, partial(encoder.audio, sounds)
    elif given.texts is not None:
        words = [given.texts] if isinstance(given.texts, str) else given.texts
        modality, texts = Modality.TEXT, list(cast("Iterable[str]", words))
        sources, encode = texts, partial(encoder.texts, texts)
    else:
        raise InputError("add: got nothing. Pass images=, texts=, audio= or vectors=.")
    if len(sources) == 0:
        return Content([], [], [], modality, None)
    space_of = encoder.space(modality)
    check_space(space, space_of, f"{encoder.bundle} encodes {modality.value}s into vectors")
    embeddings = encode()
    files = [None if modality is Modality.TEXT else _path(each) for each in sources]
    skip = modality is Modality.TEXT or not hashed
    hashes = [None if skip else _hash(each) for each in sources]
    return Content(checked_vectors(embeddings, dim), files, hashes, modality, space_of)


def as_list(images: ImageSource | Iterable[ImageSource]) -> Sequence[ImageSource] | Array:
    """Return images as a list, or as the array that they are."""
    several = image_sources(images)
    if several is None:
        return [cast(ImageSource, images)]
    return several if isinstance(several, np.ndarray) else list(several)


def new_id(source: str | None) -> str:
    """Return the id of an item that was given none: its file, or a random one."""
    return source or uuid.uuid4().hex


def _path(source: object) -> str | None:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    return None


def _hash(source: object) -> str | None:
    if isinstance(source, str | os.PathLike):
        return sha256_file(Path(source))

    if isinstance(source, bytes | bytearray | memoryview):
        return hashlib.sha256(source).hexdigest()
    return None
