"""Log-mel spectrograms of audio, equal to transformers' feature extractors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mmedge.errors import InputError
from mmedge.preprocess.config import AudioConfig
from mmedge.preprocess.steps import FitLength, LogMel
from mmedge.preprocess.waveform import AudioSource, is_audio_source, load_waveform
from mmedge.specs import Array, Modality

__all__ = ["AudioProcessor"]

_FRAMES = 4096  # windows transformed at once, so that memory does not grow with length
_FLOOR = 1e-10


class AudioProcessor:
    """Resample, fit the length and take the log-mel spectrogram.

    Equal to CLAP's and Whisper's extractors within 1e-5 of the range, except that nothing is
    random: of audio that is too long, the middle is taken where CLAP takes any part. Each item is
    prepared as the reference prepares it alone.

    Args:
        config: The bundle's frozen configuration.
    """

    modality: ClassVar[Modality] = Modality.AUDIO

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self._filters = _mel_filters(config.log_mel, config.sampling_rate)

    @classmethod
    def open(cls, config: AudioConfig, folder: Path) -> AudioProcessor:  # noqa: ARG003
        """Open from a bundle's folder, which audio does not use."""
        return cls(config)

    def example(self) -> tuple[Array, int]:
        """Return a second of a tone of 440 Hz, and its sampling rate."""
        rate = self.config.sampling_rate
        return np.sin(np.arange(rate) * (2 * np.pi * 440 / rate)).astype(np.float32), rate

    def __call__(self, items: Sequence[AudioSource]) -> dict[str, Array]:
        """Prepare audio.

        Args:
            items: N of them: paths, bytes of audio files, or (samples, rate).

        Returns:
            By graph input: the spectrograms, float32, laid out as AudioConfig says.

        Raises:
            InputError: If an item cannot be used (AudioError, ShapeError, DTypeError: see
                load_waveform), or there is none. Where there are several, the message begins with
                the item's position.
        """
        if is_audio_source(items) or not isinstance(items, Sequence):
            raise InputError(f"Audio: got {type(items).__name__}, expected a list. Pass [audio].")
        if not items:
            raise InputError("Audio: got none, expected at least one.")
        names = [f"audio[{position}]: " if len(items) > 1 else "" for position in range(len(items))]
        made = [self._prepare(item, name) for item, name in zip(items, names, strict=True)]
        return {self.config.input: np.stack(made)}

    def _prepare(self, item: AudioSource, name: str) -> Array:
        """Return the features of one item, float32."""
        try:
            samples = load_waveform(item, self.config.sampling_rate)
        except InputError as error:
            raise type(error)(f"{name}{error}") from error
        length, log_mel = self.config.length, self.config.log_mel
        if length.truncate != "fusion":
            features = self._log_mel(_fitted(samples, length))
            return features if log_mel.log == "whisper" else features[None]
        # The reference also fuses shorter audio if it is alone in a batch.
        longer = len(samples) > length.samples
        whole = self._log_mel(samples if longer else _fitted(samples, length))
        frames = length.samples // log_mel.hop + 1
        if len(whole) <= frames:
            return np.stack([whole] * 4)
        return _fused(whole, frames)

    def _log_mel(self, samples: Array) -> Array:
        """Return (frames, mels) float32; whisper's (mels, frames)."""
        step = self.config.log_mel
        padded = np.pad(samples, step.fft_size // 2, mode="reflect")
        windows = sliding_window_view(padded, step.fft_size)[:: step.hop]
        hann = np.hanning(step.fft_size + 1)[:-1]
        mels = np.empty((len(windows), step.mels))
        for start in range(0, len(windows), _FRAMES):
            part = slice(start, start + _FRAMES)
            # The reference keeps its spectrum in single precision, all else in double.
            spectrum = np.fft.rfft(windows[part] * hann).astype(np.complex64)
            mels[part] = (np.abs(spectrum).astype(np.float64) ** 2) @ self._filters
        decades = np.log10(np.maximum(mels, _FLOOR))
        if step.log == "db":
            return (10 * decades).astype(np.float32)
        decades = decades[:-1]
        clamped = np.maximum(decades, decades.max() - 8)
        return np.ascontiguousarray(((clamped + 4) / 4).T, np.float32)


def _fitted(samples: Array, step: FitLength) -> Array:
    wanted = step.samples
    if len(samples) >= wanted:
        start = (len(samples) - wanted) // 2 if step.truncate == "centre" else 0
        return samples[start : start + wanted]
    if step.pad == "repeat":
        return np.resize(samples, wanted)
    if step.pad == "repeat_zeros":
        samples = np.tile(samples, wanted // len(samples))
    return np.pad(samples, (0, wanted - len(samples)))


def _fused(mel: Array, frames: int) -> Array:
    """Return CLAP's four channels, (4, frames, mels): the whole, shrunk, and three windows of it.

    Args:
        mel: (total, mels) float32 with total > frames.
        frames: Length of a window.
    """
    thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
    # With fewer than three windows, the reference repeats the first.
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    # Linear interpolation between frame centres in single precision, as torch does.
    scale, half = np.float32(len(mel) / frames), np.float32(0.5)
    at = np.maximum(scale * (np.arange(frames, dtype=np.float32) + half) - half, 0)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, len(mel) - 1)
    share = (at - low.astype(np.float32))[:, None]
    shrunk = mel[low] * (1 - share) + mel[high] * share
    return np.stack([shrunk, *(mel[start : start + frames] for start in starts)])


def _mel_filters(step: LogMel, rate: int) -> Array:
    """Return triangular filters, (fft_size // 2 + 1, mels) float64."""
    edges = np.linspace(_to_mel(step.min_hz, step), _to_mel(step.max_hz, step), step.mels + 2)
    hz = _to_hz(edges, step)
    bins = np.linspace(0, rate // 2, step.fft_size // 2 + 1)[:, None]
    width = np.diff(hz)
    rising, falling = (bins - hz[:-2]) / width[:-1], (hz[2:] - bins) / width[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    if step.norm == "slaney":
        filters *= 2 / (hz[2:] - hz[:-2])
    return filters


# Slaney's scale is linear up to 1 kHz (15 mel) and logarithmic above.
_SLANEY_STEP = np.log(6.4) / 27


def _to_mel(hz: float, step: LogMel) -> float:
    if step.scale == "htk":
        return float(2595 * np.log10(1 + hz / 700))
    return float(15 + np.log(hz / 1000) / _SLANEY_STEP) if hz >= 1000 else 3 * hz / 200


def _to_hz(mel: Array, step: LogMel) -> Array:
    if step.scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel >= 15, 1000 * np.exp((mel - 15) * _SLANEY_STEP), 200 * mel / 3)
