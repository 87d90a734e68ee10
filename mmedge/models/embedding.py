"""EmbeddingModel: encoders of images, texts, audio and videos, without their heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import TypeAlias, cast

import numpy as np

from mmedge.bundle.manifest import Manifest
from mmedge.errors import InputError, TextError
from mmedge.models.base import Stages
from mmedge.models.batches import EncodedFiles, Skipped, encode_ids, token_ids
from mmedge.models.encoder_stages import STAGE_NAMES, encoder_stages
from mmedge.models.encoding import EncodingModel
from mmedge.models.features import Features, features_of, tap_spaces
from mmedge.models.heads import Head, head_in
from mmedge.models.images import (
    checked_paths,
    image_batches,
    image_sources,
    preprocessed_batches,
)
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.preprocess.crops import Crops
from mmedge.preprocess.decode import Channels, ImageSource
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import TextProcessor, checked_texts
from mmedge.preprocess.video import VideoSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["EmbeddingModel", "Images", "Texts"]

Images: TypeAlias = ImageSource | Iterable[ImageSource]
"""One image or several: see EmbeddingModel.encode_image."""

Texts: TypeAlias = str | Iterable[str]

# Fields of Given by modality.
_GIVEN = {
    Modality.IMAGE: "images",
    Modality.TEXT: "texts",
    Modality.AUDIO: "audio",
    Modality.VIDEO: "videos",
}


class EmbeddingModel(EncodingModel):
    """Base of the kinds whose roles embed: `DualEncoder` and `Encoder`.

    Every method may be called from several threads at once: sessions and processors hold no state
    between calls. A call that is running while another thread closes the model ends well or with a
    BackendError.

    A dynamic int8 variant ("int8-dynamic") scales activations over a whole batch, so there an
    embedding depends slightly on what it is batched with; batch_size=1 gives what its quality was
    measured on. No other variant does, static int8 included, beyond rounding.
    """

    @property
    def taps(self) -> Mapping[Modality, Mapping[str, str]]:
        """Fingerprint of each tap of the encoders that are loaded, by modality."""
        return {
            modality: tap_spaces(self._section, role, self._variants[role])
            for modality, role in self.encoders.items()
            if role in self._variants
        }

    @cached_property
    def heads(self) -> Mapping[str, Head]:
        """Heads in the same bundle that are loaded, by role, bound to this model."""
        found = {r: h for r, h in self._section.heads.items() if r in self._sessions}
        return {role: head_in(self, role, section, self._run) for role, section in found.items()}

    @property
    def image_processor(self) -> ImageProcessor:
        """Processor from images to the image encoder's input.

        Raises:
            InputError: If the image encoder is not there.
        """
        return cast(ImageProcessor, self._processor(self._role(Modality.IMAGE)))

    @property
    def text_processor(self) -> TextProcessor:
        """Processor from texts to the text encoder's inputs.

        Raises:
            InputError: If the text encoder is not there.
        """
        return cast(TextProcessor, self._processor(self._role(Modality.TEXT)))

    def encode_image(
        self,
        images: Images,
        *,
        batch_size: int | None = None,
        channels: Channels | None = None,
        max_pixels: int | None = None,
        skipped: list[Skipped] | None = None,
    ) -> Float32Array:
        """Encode images.

        Args:
            images: One image: a path, the bytes of an image file, a binary file object, a PIL
                image, a RawFrame, a uint8 array or CPU tensor (H, W, 3), (H, W, 4) or (H, W). Or
                several: a list, an array of paths, an iterator or generator of these, or a uint8
                array (N, H, W, 3); they are read and encoded batch by batch, the next ones
                prepared in threads meanwhile, in memory that does not grow with their number. Or a
                float32 array (N, 3, h, w) that is preprocessed already.
            batch_size: Images that run through the graph at once; None takes the bundle's own.
            channels: Order of the channels in arrays: "rgb", or "bgr" for frames of OpenCV; None
                takes what `load` was given.
            max_pixels: Largest image that is decoded; None takes what `load` was given.
            skipped: Takes the images that cannot be read, which then have no row; None raises
                instead.

        Returns:
            (N, D) float32, L2-normalised; (1, D) for one image.

        Raises:
            ImageError: If an image cannot be read; its path or position is named.
            InputError: If there is no image, or one of a wrong type, shape or dtype.
            BackendError: If the engine fails, or the encoder is closed.
        """
        return self._image_rows(0, images, batch_size, channels, max_pixels, skipped)

    def _image_rows(
        self,
        output: int,
        images: Images,
        batch_size: int | None,
        channels: Channels | None,
        max_pixels: int | None,
        skipped: list[Skipped] | None,
    ) -> Float32Array:
        """Return one output of the image encoder, by its position; see encode_image."""
        name = self._output_name(Modality.IMAGE, output)
        runs = self._image_runs(images, batch_size, channels, max_pixels, skipped)
        parts = [run[name].astype(np.float32, copy=False) for run in runs]
        if not parts and not skipped:
            raise InputError("Images: got none, expected at least one.")
        return self._joined(parts, Modality.IMAGE, output)

    def _image_runs(
        self,
        images: Images,
        batch_size: int | None,
        channels: Channels | None,
        max_pixels: int | None,
        skipped: list[Skipped] | None,
    ) -> Iterator[dict[str, Array]]:
        """Yield the outputs of the image encoder for each batch; see encode_image."""
        processor = self.image_processor.with_options(channels=channels, max_pixels=max_pixels)
        role = self._role(Modality.IMAGE)
        size = self._batch_size(role, batch_size)
        several = image_sources(images)
        if several is None and skipped is None:  # one image, named without a position
            yield self._run(role, processor([cast(ImageSource, images)]))
            return
        if isinstance(several, np.ndarray) and several.dtype != np.uint8:
            arrays = preprocessed_batches(several, size)
            ready = ({processor.config.input: batch} for batch in arrays)
        else:
            sources = [cast(ImageSource, images)] if several is None else several
            ready = image_batches(sources, processor, size, skipped, batches_ahead=self._ahead)
        with closing(ready) as batches:
            for batch in batches:
                yield self._run(role, batch)

    def extract(
        self,
        images: Images,
        *,
        time: float | None = None,
        batch_size: int | None = None,
        channels: Channels | None = None,
        max_pixels: int | None = None,
    ) -> Features:
        """Run the image encoder once and return its taps, which any number of heads read.

        Args:
            images: As for encode_image.
            time: When they were taken, in seconds of one clock, for heads that limit the skew of
                their inputs.
            batch_size: As for encode_image.
            channels: As for encode_image.
            max_pixels: As for encode_image.

        Raises:
            ImageError: If an image cannot be read; its path or position is named.
            InputError: If there is no image, or one of a wrong type, shape or dtype.
            BackendError: If the engine fails, or the encoder is closed.
        """
        runs = self._image_runs(images, batch_size, channels, max_pixels, None)
        return self._features(Modality.IMAGE, runs, time)

    def extract_text(
        self, texts: Texts, *, time: float | None = None, batch_size: int | None = None
    ) -> Features:
        """Run the text encoder once and return its taps.

        Args:
            texts: As for encode_text.
            time: As for extract.
            batch_size: As for encode_text.

        Raises:
            TextError: If there is no text, or one is empty, enormous or not valid Unicode.
            InputError: If the model has no text encoder.
            BackendError: If the engine fails, or the encoder is closed.
        """
        role, processor = self._role(Modality.TEXT), self.text_processor
        size = self._batch_size(role, batch_size)
        given = [texts] if isinstance(texts, str) else list(checked_texts(texts))
        starts = range(0, len(given), size)
        runs = (self._run(role, processor(given[at : at + size])) for at in starts)
        return self._features(Modality.TEXT, runs, time)

    def _features(
        self, modality: Modality, runs: Iterable[Mapping[str, Array]], time: float | None
    ) -> Features:
        role = self._role(modality)
        self._session(role)
        first = self.manifest.roles[role].outputs[0].name
        spaces = tap_spaces(self._section, role, self._variants[role])
        return features_of(runs, self._section, role, first, spaces, modality, time)

    def encode_image_files(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        skip_bad: bool = False,
        batch_size: int | None = None,
        max_pixels: int | None = None,
    ) -> EncodedFiles:
        """Encode image files, optionally skipping unreadable ones.

        Args:
            paths: A folder, of which all images are taken, subfolders included, sorted by path; or
                image files, as few or as many as there are.
            skip_bad: Skip a file that cannot be read as an image and report it in `skipped`.
            batch_size: As for encode_image.
            max_pixels: As for encode_image.

        Raises:
            ImageError: If a file cannot be read and skip_bad is off; its path is named.
            InputError: If one is not a path, or a folder holds no images.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self.image_processor.with_options(max_pixels=max_pixels)
        size = self._batch_size(self._role(Modality.IMAGE), batch_size)
        names: list[str] = []
        skipped: list[Skipped] = []
        sources = checked_paths(paths, names)
        bad_ones = skipped if skip_bad else None
        ready = image_batches(sources, processor, size, bad_ones, batches_ahead=self._ahead)
        with closing(ready) as batches:
            embeddings = self._joined(
                [self._rows(Modality.IMAGE, batch) for batch in batches], Modality.IMAGE
            )
        bad = {image.position for image in skipped}
        kept = tuple(name for position, name in enumerate(names) if position not in bad)
        return EncodedFiles(embeddings, kept, tuple(skipped))

    @property
    def _ahead(self) -> int:
        """Batches of images that are prepared while one is encoded."""
        device = self._session(self._role(Modality.IMAGE)).placement.device
        return 1 if device == "cpu" else 2

    def encode_boxes(
        self,
        image: ImageSource,
        boxes: Array | Sequence[Sequence[float]],
        *,
        batch_size: int | None = None,
        channels: Channels | None = None,
        max_pixels: int | None = None,
    ) -> Float32Array:
        """Encode parts of one image, such as what a detector found, decoding it once.

        Args:
            image: One image: as for encode_image.
            boxes: (N, 4) left, top, right, bottom in pixels of the upright image; rounded outwards
                to whole pixels, and cut off at the image's border.
            batch_size: As for encode_image.
            channels: As for encode_image.
            max_pixels: As for encode_image; a larger JPEG is refused too.

        Returns:
            (N, D) float32, L2-normalised, in the order of the boxes; (0, D) without boxes.

        Raises:
            ImageError: If the image cannot be read.
            InputError: If a box is empty or outside the image; it is named.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self.image_processor.with_options(channels=channels, max_pixels=max_pixels)
        size = self._batch_size(self._role(Modality.IMAGE), batch_size)
        crops = Crops(processor.decode(image, whole=True), boxes)
        with closing(image_batches(crops, processor, size, batches_ahead=self._ahead)) as batches:
            return self._joined(
                [self._rows(Modality.IMAGE, batch) for batch in batches], Modality.IMAGE
            )

    def encode_text(
        self,
        texts: Texts,
        *,
        batch_size: int | None = None,
        skipped: list[Skipped] | None = None,
    ) -> Float32Array:
        """Encode texts.

        Texts of like length run together, so that a short one is not padded to a long one where
        the model's output does not depend on the padding.

        Args:
            texts: One text or several: a list, an array, an iterator or generator, which is read
                and encoded some thousand at a time. What exceeds the model's length is truncated.
            batch_size: Texts that run through the graph at once; None takes the bundle's own.
            skipped: Takes the texts that cannot be used, such as missing captions, which then have
                no row; None raises instead.

        Returns:
            (N, D) float32, L2-normalised, in the order of the texts; (1, D) for one text.

        Raises:
            TextError: If there is no text, or one is empty, enormous or not valid Unicode; its
                position is named.
            BackendError: If the engine fails, or the encoder is closed.
        """
        return self._text_rows(0, texts, batch_size, skipped)

    def _text_rows(
        self,
        output: int,
        texts: Texts,
        batch_size: int | None = None,
        skipped: list[Skipped] | None = None,
    ) -> Float32Array:
        """Return one output of the text encoder, by its position; see encode_text."""
        processor = self.text_processor
        size = self._batch_size(self._role(Modality.TEXT), batch_size)
        several = [texts] if isinstance(texts, str) else checked_texts(texts)
        run = partial(self._rows, Modality.TEXT, output=output)
        with closing(token_ids(several, processor, skipped)) as chunks:
            parts = [encode_ids(ids, processor, size, run) for ids in chunks]
        if not parts and not skipped:
            raise TextError("Texts: got none, expected at least one.")
        return self._joined(parts, Modality.TEXT, output)

    def prepare(
        self, modality: Modality, item: object, *, shrink: bool = False
    ) -> dict[str, Array]:
        """Return the inputs of an encoder's graph for one item, for `encode_prepared`.

        Args:
            modality: Of the encoder.
            item: An image, a sound, a text or a video.
            shrink: Decode a large JPEG at a fraction of its size: see decode_image.

        Raises:
            InputError: If the item cannot be used, or the model has no such encoder.
        """
        if modality is Modality.IMAGE:
            processor = self.image_processor
            return processor([processor.decode(cast(ImageSource, item), shrink=shrink)])
        return self._processor(self._role(modality))([item])

    def encode_prepared(self, modality: Modality, feed: Mapping[str, Array]) -> Float32Array:
        """Encode a batch of prepared items.

        Args:
            modality: Of the encoder.
            feed: What `prepare` returned for N items, joined along the first axis.

        Returns:
            (N, D) float32, L2-normalised.

        Raises:
            BackendError: If the engine fails, or the encoder is closed.
        """
        return self._rows(modality, feed)

    @property
    def runs(self) -> Mapping[str, Run]:
        """Embed what the encoders take."""
        takes = frozenset(_GIVEN[each] for each in self.encoders)
        return {"embed": Run(self._run_embed, frozenset(), takes)}

    def _run_embed(self, given: Given, settings: Settings) -> Made:  # noqa: ARG002
        made: dict[str, Float32Array] = {}
        rows: list[Mapping[str, object]] = []
        encode = {
            "images": lambda: self.encode_image(list(given.images)),
            "texts": lambda: self.encode_text(list(given.texts)),
            "audio": lambda: self.encode_audio(list(given.audio)),
            "videos": lambda: self.encode_video(list(given.videos)),
        }
        for name in sorted(given.names):
            made[name] = encode[name]()
            items = zip(getattr(given, name), made[name].tolist(), strict=True)
            rows += [{"input": str(item), "embedding": vector} for item, vector in items]
        return Made(rows, made)

    @classmethod
    def stage_names(cls, manifest: Manifest, role: str) -> tuple[str, ...]:
        """Return the stage names of the call that encodes the role's modality."""
        return STAGE_NAMES.get(manifest.modality(role), ())

    def call(self, role: str, sample: object) -> Callable[[], object] | None:
        """Return the call that encodes a sample of the role's modality; None for a head."""
        modality = self.manifest.modality(role)
        if modality is None:
            return None
        if modality is Modality.IMAGE:
            return lambda: self.encode_image(cast(ImageSource, sample))
        if modality is Modality.TEXT:
            return lambda: self.encode_text(str(sample))
        if modality is Modality.VIDEO:
            return lambda: self.encode_video(cast(VideoSource, sample))
        return lambda: self.encode_audio(cast(AudioSource, sample))

    def stages(self, role: str, sample: object) -> Stages | None:
        """Return the call of a role and its stages, each with its input ready."""
        whole = self.call(role, sample)
        if whole is None:
            return None
        return encoder_stages(whole, self._processor(role), self._session(role), sample)
