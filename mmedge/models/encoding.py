"""EncodingModel: what encoders of any modality share, and those of audio and videos."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from mmedge.bundle.kinds import EmbeddingKind
from mmedge.errors import InputError
from mmedge.models.base import Model
from mmedge.preprocess.video import VideoSource, is_video_source
from mmedge.preprocess.waveform import AudioSource, is_audio_source
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["EncodingModel"]


class EncodingModel(Model):
    """Base of EmbeddingModel: roles by modality, their outputs, and audio and videos."""

    @property
    def encoders(self) -> Mapping[Modality, str]:
        """The encoders' roles by modality."""
        return self._section.encoders

    @property
    def spaces(self) -> Mapping[str, str | None]:
        """Embedding-space fingerprint of the running variant, by role name."""
        roles = set(self.encoders.values())
        return {role: one.space for role, one in self._variants.items() if role in roles}

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint shared by all roles, None if they differ."""
        spaces = set(self.spaces.values())
        return spaces.pop() if len(spaces) == 1 else None

    @property
    def embedding_dim(self) -> int:
        """D, the length of an embedding."""
        return self._section.embedding_dim

    def encode_audio(
        self, sounds: AudioSource | Iterable[AudioSource], *, batch_size: int | None = None
    ) -> Float32Array:
        """Encode audio.

        Args:
            sounds: One sound or several: paths, bytes or file objects of audio files, or
                (samples, rate) pairs.
            batch_size: Sounds that run through the graph at once; None takes the bundle's own.

        Returns:
            (N, D) float32, L2-normalised; (1, D) for one sound.

        Raises:
            AudioError: If a sound cannot be read; its position is named.
            InputError: If there is no sound, or the model has no audio encoder.
            BackendError: If the engine fails, or the encoder is closed.
        """
        processor = self._processor(self._role(Modality.AUDIO))
        size = self._batch_size(self._role(Modality.AUDIO), batch_size)
        items = [sounds] if is_audio_source(sounds) else list(cast("Iterable[AudioSource]", sounds))
        if not items:
            raise InputError("Audio: got none, expected at least one.")
        starts = range(0, len(items), size)
        parts = [
            self._rows(Modality.AUDIO, processor(items[start : start + size])) for start in starts
        ]
        return np.concatenate(parts)

    def encode_video(
        self, videos: VideoSource | Iterable[VideoSource], *, batch_size: int | None = None
    ) -> Float32Array:
        """Encode videos.

        Args:
            videos: One video: a path, of which frames at even distances are taken, or exactly the
                frames that the model takes, as a list of images or a uint8 array (frames, H, W,
                3). Or several: a list, an iterator or a generator of these.
            batch_size: Videos that run through the graph at once; None takes the bundle's own.

        Returns:
            (N, D) float32, L2-normalised; (1, D) for one video.

        Raises:
            InputError: If a video cannot be read, has too few frames, or there is none; its
                position is named.
            ShapeError: If it has not as many frames as the model takes.
            BackendError: If the engine fails, or the encoder is closed.
        """
        name = self._output_name(Modality.VIDEO)
        outputs = self._video_outputs(videos, batch_size)
        return np.concatenate([made[name].astype(np.float32, copy=False) for made in outputs])

    def _video_outputs(
        self, videos: VideoSource | Iterable[VideoSource], batch_size: int | None
    ) -> Iterator[dict[str, Array]]:
        """Yield the video encoder's outputs, batch by batch; see encode_video."""
        role = self._role(Modality.VIDEO)
        processor, size = self._processor(role), self._batch_size(role, batch_size)
        read = iter([videos] if is_video_source(videos) else cast("Iterable[VideoSource]", videos))
        done = 0
        while batch := list(itertools.islice(read, size)):
            yield self._run(role, processor(batch))
            done += len(batch)
        if not done:
            raise InputError("Videos: got none, expected at least one.")

    def _joined(
        self, parts: Sequence[Float32Array], modality: Modality, output: int = 0
    ) -> Float32Array:
        if len(parts) == 1:
            return parts[0]
        width = int(self.manifest.roles[self._role(modality)].outputs[output].shape[1])
        return np.concatenate(parts or [np.empty((0, width), np.float32)])

    def _output_name(self, modality: Modality, output: int = 0) -> str:
        """Return the name of an encoder's output, by its position.

        Raises:
            InputError: If the model has no such encoder, or it was not loaded.
        """
        role = self._role(modality)
        self._session(role)
        return self.manifest.roles[role].outputs[output].name

    def _rows(self, modality: Modality, feed: Mapping[str, Array], output: int = 0) -> Float32Array:
        """Run an encoder and return one of its outputs; the first is the embedding."""
        name = self._output_name(modality, output)
        rows: Float32Array = self._run(self._role(modality), feed)[name]
        return rows.astype(np.float32, copy=False)

    def _role(self, modality: Modality) -> str:
        """Return the role of a modality.

        Raises:
            InputError: If the model has none.
        """
        return self.encoders.get(modality, f"{modality.value}_encoder")

    @property
    def _section(self) -> EmbeddingKind:
        kind = self.manifest.kind
        assert isinstance(kind, EmbeddingKind)  # noqa: S101, the registry's
        return kind
