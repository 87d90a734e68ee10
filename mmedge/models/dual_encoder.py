"""DualEncoder: images, texts and sounds in one embedding space."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from PIL import Image

from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.manifest import Manifest, Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import BundleError, DTypeError, ImageError, InputError, ShapeError
from mmedge.models.base import Model, Stages
from mmedge.models.batches import BadImage, image_batches, length_buckets
from mmedge.models.classification import (
    DEFAULT_TEMPLATE,
    Classification,
    label_prompts,
    probabilities,
)
from mmedge.preprocess.decode import ImageSource, decode_image
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import TextProcessor
from mmedge.preprocess.waveform import AudioSource
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import Session
from mmedge.sessions.warming import WarmingUp
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["DualEncoder", "EncodedFiles", "Images", "Texts"]

Images: TypeAlias = ImageSource | Iterable[ImageSource]
"""One picture or several: see DualEncoder.encode_image."""

Texts: TypeAlias = str | Sequence[str]

_LABEL_SETS = 8  # sets of labels whose embeddings are kept
_STAGES: Mapping[Modality | None, tuple[str, ...]] = {
    Modality.IMAGE: ("decode", "resize", "normalize", "inference"),
    Modality.TEXT: ("tokenize", "inference"),
    Modality.AUDIO: ("log-mel", "inference"),
}


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFiles:
    """Embeddings of image files, and the files that gave none.

    Attributes:
        embeddings: (K, D) float32, L2-normalised; row i belongs to paths[i].
        paths: The K files that were encoded, in the order they were given.
        bad: The files that were skipped.
    """

    embeddings: Float32Array
    paths: tuple[str, ...]
    bad: tuple[BadImage, ...]


class DualEncoder(Model):
    """Encoders of two modalities, or one, into one embedding space, ready to run.

    Made by `mmedge.load`. Every method may be called from several threads at once: sessions and
    processors hold no state between calls, and the kept label embeddings are behind a lock. A call
    that is running while another thread closes the encoder ends well or with a BackendError.

    A dynamic int8 variant ("int8-dynamic") scales activations over a whole batch, so there an
    embedding depends slightly on what it is batched with; batch_size=1 gives what its quality was
    measured on. No other variant does, static int8 included, beyond rounding.
    """

    kind = "dual_encoder"

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, Session],
        variants: Mapping[str, Variant],
        choices: Mapping[str, Choice] | None = None,
        warming: WarmingUp | None = None,
    ) -> None:
        super().__init__(bundle, sessions, variants, choices, warming)
        self._label_lock = threading.Lock()
        self._label_embeddings: OrderedDict[tuple[str, ...], Float32Array] = OrderedDict()

    @property
    def encoders(self) -> Mapping[Modality, str]:
        """The encoders' roles by modality."""
        return self._section.encoders

    @property
    def spaces(self) -> Mapping[str, str | None]:
        """Embedding-space fingerprint of the variant that runs, by role name."""
        return {role: variant.space for role, variant in self._variants.items()}

    @property
    def space(self) -> str | None:
        """The embedding-space fingerprint that all roles share, None where they differ."""
        spaces = set(self.spaces.values())
        return spaces.pop() if len(spaces) == 1 else None

    @property
    def embedding_dim(self) -> int:
        """D, the length of an embedding."""
        return self._section.embedding_dim

    @property
    def _section(self) -> DualEncoderKind:
        kind = self.manifest.kind
        assert isinstance(kind, DualEncoderKind)  # noqa: S101, the registry's
        return kind

    @property
    def image_processor(self) -> ImageProcessor:
        """What turns pictures into the image encoder's input.

        Raises:
            InputError: If the image encoder is not there.
        """
        return cast(ImageProcessor, self._processor(self._role(Modality.IMAGE)))

    @property
    def text_processor(self) -> TextProcessor:
        """What turns texts into the text encoder's inputs.

        Raises:
            InputError: If the text encoder is not there.
        """
        return cast(TextProcessor, self._processor(self._role(Modality.TEXT)))

    def encode_image(self, images: Images, *, batch_size: int | None = None) -> Float32Array:
        """Encode pictures.

        Args:
            images: One picture: a path, the bytes of an image file, a PIL image, a uint8 array
                (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) greyscale. Or several: a list, tuple,
                iterator or generator of these, or a uint8 array (N, H, W, 3); they are read,
                prepared and encoded batch by batch, in memory that does not grow with their
                number. Or a float32 array (N, 3, h, w) that is preprocessed already.
            batch_size: Pictures that run through the graph at once; None takes the bundle's own.

        Returns:
            (N, D) float32, L2-normalised; (1, D) for one picture.

        Raises:
            ImageError: If a picture cannot be read; its path or position is named.
            InputError: If there is no picture, or one of a wrong type, shape or dtype.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self.image_processor
        size = self._batch_size(Modality.IMAGE, batch_size)
        if isinstance(images, np.ndarray):
            if images.ndim == 4 and images.dtype != np.uint8:
                return self._encode_tensor(images, size)
            if images.ndim != 4:
                return self._embed(Modality.IMAGE, processor([images]))
        elif isinstance(images, (str, os.PathLike, bytes, Image.Image)):
            return self._embed(Modality.IMAGE, processor([images]))
        elif not isinstance(images, Iterable):
            raise InputError(
                f"Images: got {type(images).__name__}, expected a path, bytes, a PIL image, a "
                "uint8 array, or several of them."
            )
        parts = [self._run_image(batch) for batch in image_batches(images, processor, size)]
        if not parts:
            raise InputError("Images: got none, expected at least one.")
        return np.concatenate(parts)

    def encode_image_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        skip_bad: bool = False,
        batch_size: int | None = None,
    ) -> EncodedFiles:
        """Encode image files, and go on past those that cannot be read if asked to.

        Args:
            paths: Image files, as few or as many as there are.
            skip_bad: Skip a file that cannot be read as an image and report it in `bad`.
            batch_size: As for encode_image.

        Raises:
            ImageError: If a file cannot be read and skip_bad is off; its path is named.
            InputError: If one is not a path.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self.image_processor
        size = self._batch_size(Modality.IMAGE, batch_size)
        names: list[str] = []
        bad: list[BadImage] = []
        batches = image_batches(
            _checked_paths(paths, names), processor, size, bad if skip_bad else None
        )
        parts = [self._run_image(batch) for batch in batches]
        skipped = {image.position for image in bad}
        kept = tuple(name for position, name in enumerate(names) if position not in skipped)
        if not parts:
            return EncodedFiles(np.empty((0, self.embedding_dim), np.float32), kept, tuple(bad))
        return EncodedFiles(np.concatenate(parts), kept, tuple(bad))

    def encode_text(self, texts: Texts, *, batch_size: int | None = None) -> Float32Array:
        """Encode texts.

        Texts of like length run together, so that a short one is not padded to a long one where
        the model's answer does not depend on the padding.

        Args:
            texts: One text or several. What exceeds the model's length is truncated.
            batch_size: Texts that run through the graph at once; None takes the
                bundle's own.

        Returns:
            (N, D) float32, L2-normalised, in the order of the texts; (1, D) for one text.

        Raises:
            TextError: If there is no text, or one is empty, enormous or not valid Unicode; its
                position is named.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self.text_processor
        size = self._batch_size(Modality.TEXT, batch_size)
        ids = processor.tokenize([texts] if isinstance(texts, str) else texts)
        if processor.config.padding == "longest":
            groups = length_buckets(ids, size)
        else:
            everything = list(range(len(ids)))
            groups = [everything[start : start + size] for start in range(0, len(ids), size)]
        if len(groups) == 1:
            return self._embed(Modality.TEXT, processor.pad(ids))
        embeddings = np.empty((len(ids), self.embedding_dim), np.float32)
        for group in groups:
            feed = processor.pad([ids[position] for position in group])
            embeddings[group] = self._embed(Modality.TEXT, feed)
        return embeddings

    def similarity(self, images: Images, texts: Texts | Float32Array) -> Float32Array:
        """Return the cosine similarity of every picture with every text.

        Args:
            images: Pictures, or their embeddings (N, D) float32 from encode_image.
            texts: Texts, or their embeddings (M, D) float32 from encode_text.

        Returns:
            (N, M) float32 in [-1, 1].

        Raises:
            InputError: As for encode_image and encode_text, and if embeddings have another D.
        """
        similarities: Float32Array = self._image_embeddings(images) @ self._text_embeddings(texts).T
        return similarities

    def classify(
        self, images: Images, labels: Sequence[str] | str, *, template: str = DEFAULT_TEMPLATE
    ) -> Classification:
        """Say which of some labels the pictures show.

        The embeddings of the last 8 sets of labels are kept, so that asking again is quick.

        Args:
            images: Pictures, or their embeddings (N, D) float32 from encode_image.
            labels: L labels, or the name of one of the bundle's label banks.
            template: The text that is encoded for a label, "{}" standing for it.

        Returns:
            The labels and their probabilities, (N, L).

        Raises:
            InputError: As for encode_image and encode_text, if a label is empty or given twice, if
                there is no such label bank, or the template has no "{}".
            BundleError: If the bundle has no contrastive head.
        """
        head = self._section.contrastive_head
        if head is None:
            raise BundleError(
                f"{self._bundle.path}: has no contrastive head, so its similarities cannot be "
                "turned into probabilities. Use similarity."
            )
        chosen = self._label_bank(labels) if isinstance(labels, str) else tuple(labels)
        prompts = label_prompts(chosen, template)
        similarities = self._image_embeddings(images) @ self._prompt_embeddings(prompts).T
        return Classification(chosen, probabilities(similarities, head))

    def encode_audio(
        self, sounds: AudioSource | Sequence[AudioSource], *, batch_size: int | None = None
    ) -> Float32Array:
        """Encode sounds.

        Args:
            sounds: One sound or several: paths or bytes of audio files, or (samples, rate) pairs.
            batch_size: Sounds that run through the graph at once; None takes the bundle's own.

        Returns:
            (N, D) float32, L2-normalised; (1, D) for one sound.

        Raises:
            AudioError: If a sound cannot be read; its position is named.
            InputError: If there is no sound, or the model has no audio encoder.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self._processor(self._role(Modality.AUDIO))
        size = self._batch_size(Modality.AUDIO, batch_size)
        single = isinstance(sounds, (str, bytes, os.PathLike, tuple))
        items: Sequence[AudioSource] = [sounds] if single else list(sounds)  # type: ignore[list-item, arg-type]
        if not items:
            raise InputError("Sounds: got none, expected at least one.")
        starts = range(0, len(items), size)
        parts = [
            self._embed(Modality.AUDIO, processor(items[start : start + size])) for start in starts
        ]
        return np.concatenate(parts)

    @classmethod
    def stage_names(cls, manifest: Manifest, role: str) -> tuple[str, ...]:
        """Return the parts of encode_image, encode_text or encode_audio."""
        return _STAGES.get(manifest.modality(role), ())

    def call(self, role: str, sample: object) -> Callable[[], object] | None:
        """Return encode_image, encode_text or encode_audio on a sample."""
        modality = self.manifest.modality(role)
        if modality is Modality.IMAGE:
            return lambda: self.encode_image(cast(ImageSource, sample))
        if modality is Modality.TEXT:
            return lambda: self.encode_text(str(sample))
        return lambda: self.encode_audio(cast(AudioSource, sample))

    def stages(self, role: str, sample: object) -> Stages | None:
        """Return the call of a role and its parts, each with its input ready."""
        modality, whole = self.manifest.modality(role), self.call(role, sample)
        if whole is None:
            return None
        if modality is Modality.IMAGE:
            return self._image_stages(whole, role, cast(ImageSource, sample))
        processor = self._processor(role)
        ready = self._ready(role, processor([sample]))
        parts = (lambda: processor([sample]), lambda: self._session(role).run(ready))
        shapes = ", ".join(f"{name} {array.shape}" for name, array in ready.items())
        return Stages(whole, dict(zip(_STAGES[modality], parts, strict=True)), shapes)

    def _image_stages(self, whole: Callable[[], object], role: str, sample: ImageSource) -> Stages:
        processor = self.image_processor
        image = decode_image(sample)
        frames = processor.resize(image)[None]
        ready = self._ready(role, {processor.config.input: processor.normalize(frames)})
        parts = (
            lambda: decode_image(sample),
            lambda: processor.resize(image),
            lambda: processor.normalize(frames),
            lambda: self._session(role).run(ready),
        )
        shown = f"{image.width}x{image.height} image"
        return Stages(whole, dict(zip(_STAGES[Modality.IMAGE], parts, strict=True)), shown)

    def _ready(self, role: str, feed: Mapping[str, Array]) -> dict[str, Array]:
        specs = self._session(role).inputs
        return {spec.name: feed[spec.name].astype(spec.dtype, copy=False) for spec in specs}

    def _encode_tensor(self, tensor: Array, batch_size: int) -> Float32Array:
        if tensor.dtype != np.float32:
            raise DTypeError(
                f"Images {tensor.shape}: got dtype {tensor.dtype.name}, expected float32 "
                "(preprocessed) or uint8 (frames)."
            )
        _check_finite(tensor)
        if len(tensor) <= batch_size:
            return self._run_image(tensor)
        starts = range(0, len(tensor), batch_size)
        return np.concatenate([self._run_image(tensor[i : i + batch_size]) for i in starts])

    def _run_image(self, tensor: Float32Array) -> Float32Array:
        return self._embed(Modality.IMAGE, {self.image_processor.config.input: tensor})

    def _embed(self, modality: Modality, feed: Mapping[str, Array]) -> Float32Array:
        """Run an encoder and return its first output."""
        role = self._role(modality)
        embeddings: Float32Array = self._run(role, feed)[self._session(role).outputs[0].name]
        return embeddings.astype(np.float32, copy=False)

    def _role(self, modality: Modality) -> str:
        """Return the role of a modality.

        Raises:
            InputError: If the model has none.
        """
        return self.encoders.get(modality, f"{modality.value}_encoder")

    def _batch_size(self, modality: Modality, wanted: int | None) -> int:
        if wanted is not None and wanted < 1:
            raise InputError(f"batch_size: got {wanted}, expected 1 or more.")
        role = self._role(modality)
        axis = self._session(role).inputs[0].shape[0]
        if isinstance(axis, int):
            return axis
        bounds = self.manifest.roles[role].axes.get(axis)
        return wanted or (1 if bounds is None else bounds.max)

    def _image_embeddings(self, images: Images) -> Float32Array:
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.ndim < 3:
            return self._checked_embeddings(images)
        return self.encode_image(images)

    def _text_embeddings(self, texts: Texts | Float32Array) -> Float32Array:
        if isinstance(texts, np.ndarray):
            return self._checked_embeddings(texts)
        return self.encode_text(texts)

    def _checked_embeddings(self, embeddings: Array) -> Float32Array:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim:
            raise ShapeError(
                f"Embeddings: got {embeddings.shape}, expected (batch, {self.embedding_dim}). "
                "Pass what encode_image or encode_text of this model returned."
            )
        if embeddings.dtype != np.float32:
            raise DTypeError(f"Embeddings: got dtype {embeddings.dtype.name}, expected float32.")
        return embeddings

    def _prompt_embeddings(self, prompts: tuple[str, ...]) -> Float32Array:
        with self._label_lock:
            kept = self._label_embeddings.get(prompts)
            if kept is not None:
                self._label_embeddings.move_to_end(prompts)
                return kept
        # Encoded outside the lock: two threads may both do it, none waits for another's labels.
        embeddings = self.encode_text(prompts)
        with self._label_lock:
            self._label_embeddings[prompts] = embeddings
            while len(self._label_embeddings) > _LABEL_SETS:
                self._label_embeddings.popitem(last=False)
        return embeddings

    def _label_bank(self, name: str) -> tuple[str, ...]:
        banks = self._section.label_banks
        if name not in banks:
            raise InputError(
                f"Labels: '{name}' is not a label bank of this bundle, which has {sorted(banks)}. "
                "Pass a list of labels."
            )
        return banks[name]


def _check_finite(tensor: Array) -> None:
    if not np.isfinite(tensor).all():
        bad = [i for i, image in enumerate(tensor) if not np.isfinite(image).all()]
        raise ImageError(f"Images {bad}: NaN or infinite values. Check what prepared them.")


def _checked_paths(
    paths: Iterable[str | os.PathLike[str]], names: list[str]
) -> Iterable[str | os.PathLike[str]]:
    """Pass paths on, and note their names."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise InputError("Paths: got a single path, expected several. Pass [path].")
    for position, path in enumerate(paths):
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(
                f"Paths: got {type(path).__name__} at position {position}, expected str or Path. "
                "Pass other pictures to encode_image."
            )
        names.append(os.fspath(path))
        yield path
