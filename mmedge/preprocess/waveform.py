"""Audio loading and resampling to mono samples, in numpy."""

from __future__ import annotations

import importlib
import io
import math
import os
import wave
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mmedge.errors import AudioError, DTypeError, InputError, ShapeError
from mmedge.preprocess.binary import BinaryFile, seekable
from mmedge.specs import Array

__all__ = ["MAX_SAMPLES", "AudioSource", "is_audio_source", "load_waveform", "resample"]

AudioSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryFile | tuple[Array, int]
"""A path, the bytes of an audio file, a binary file object, or (samples, rate): (N,) float in
-1..1, or int16 or int32, and Hz."""

MAX_SAMPLES = 1 << 27
"""Longer audio is rejected: 46 minutes at 48 kHz."""

_RATES = (1000, 384_000)
# A windowed sinc: zero crossings on each side, Kaiser's beta, and the pass band as a share of the
# lower Nyquist frequency. Measured in tests: below 1e-4 of ripple to 0.9 of it, -80 dB of aliases.
_CROSSINGS = 64
_BETA = 9.0
_ROLLOFF = 0.95


def load_waveform(source: AudioSource, rate: int) -> Array:
    """Return mono samples at a sampling rate.

    Channels of a file are averaged. WAV files of integers are read by the standard library, all
    other formats by the package soundfile where it is installed.

    Args:
        source: Path, bytes, binary file object, or (samples, rate).
        rate: Hz of the result; audio of another rate is resampled.

    Returns:
        (N,) float64, 1 standing for full scale.

    Raises:
        AudioError: If a file is missing, damaged or of a format that cannot be read, or if audio is
            empty, too long, not finite, or out of -1..1 by far.
        ShapeError: If an array is not one-dimensional.
        DTypeError: If an array is neither float nor int16 nor int32.
        InputError: If the source is of another type, such as samples without their rate.
    """
    name = _describe(source)
    if isinstance(source, tuple) and len(source) == 2:
        samples, given_rate = _from_array(source[0], name), source[1]
    elif isinstance(source, (bytes, bytearray, memoryview)):
        samples, given_rate = _from_file(io.BytesIO(source), name)
    elif hasattr(source, "read"):
        file = seekable(source, name, AudioError)
        samples, given_rate = _from_file(file, name)
    elif isinstance(source, (str, os.PathLike)):
        try:
            with Path(source).open("rb") as file:
                samples, given_rate = _from_file(file, name)
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise AudioError(f"{name}: cannot be read ({error}).") from error
    else:
        raise InputError(
            f"{name}: not audio. Pass a path, bytes, a binary file object, or (samples, rate): an "
            "array alone does not say its sampling rate."
        )
    if isinstance(given_rate, bool) or not isinstance(given_rate, (int, np.integer)):
        raise InputError(f"{name}: got the rate {given_rate!r}, expected Hz as an int.")
    if not _RATES[0] <= given_rate <= _RATES[1]:
        raise AudioError(f"{name}: got {given_rate} Hz, expected {_RATES[0]} to {_RATES[1]} Hz.")
    _check(samples, name)
    return resample(samples, int(given_rate), rate)


def is_audio_source(source: object) -> TypeGuard[AudioSource]:
    """Return whether an object is one piece of audio, not several."""
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, tuple, np.ndarray)
    return isinstance(source, kinds) or hasattr(source, "read")


def resample(samples: Array, rate: int, to: int) -> Array:
    """Resample by a polyphase windowed sinc (Kaiser, 64 zero crossings).

    Args:
        samples: (N,) float.
        rate: Hz of the samples.
        to: Hz of the result.

    Returns:
        (ceil(N * to / rate),) float64.
    """
    samples = samples.astype(np.float64, copy=False)
    if rate == to:
        return samples
    common = math.gcd(rate, to)
    up, down = to // common, rate // common
    filters, reach = _filters(up, down)
    count = -(-len(samples) * up // down)
    windows = sliding_window_view(np.pad(samples, reach), 2 * reach + 1)
    out = np.empty(count)
    # Output n lies at n * down / up input samples; those `up` apart share a filter.
    for first in range(min(up, count)):
        start, phase = divmod(first * down, up)
        out[first::up] = windows[start::down][: len(out[first::up])] @ filters[phase]
    return out


@lru_cache(maxsize=4)
def _filters(up: int, down: int) -> tuple[Array, int]:
    """Return the filter of each phase, (up, 2 * reach + 1), and its reach in input samples."""
    cutoff = _ROLLOFF * min(1.0, up / down)
    reach = math.ceil(_CROSSINGS / cutoff)
    offsets = np.arange(-reach, reach + 1) - np.arange(up)[:, None] / up
    inside = np.clip(1 - (offsets * cutoff / _CROSSINGS) ** 2, 0, None)
    filters = cutoff * np.sinc(cutoff * offsets) * np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA)
    filters[np.abs(offsets * cutoff) > _CROSSINGS] = 0
    return filters / filters.sum(axis=1, keepdims=True), reach


def _from_array(samples: Any, name: str) -> Array:  # noqa: ANN401, whatever a caller passes
    array = np.asarray(samples)
    if array.ndim != 1:
        raise ShapeError(
            f"{name}: got {array.shape}, expected (samples,), one channel. Average the channels."
        )
    if array.dtype in (np.int16, np.int32):
        return array / -float(np.iinfo(array.dtype).min)
    if array.dtype.kind != "f":
        raise DTypeError(
            f"{name}: got dtype {array.dtype.name}, expected float in -1..1, int16 or int32."
        )
    return array.astype(np.float64)


def _from_file(file: Any, name: str) -> tuple[Array, int]:  # noqa: ANN401, a binary file
    try:
        with wave.open(file) as reader:
            return _pcm(reader, name), reader.getframerate()
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: sizes that disagree
        reason = str(error) or "truncated"
    file.seek(0)
    try:
        soundfile = importlib.import_module("soundfile")
    except ImportError as error:
        raise AudioError(
            f"{name}: not a WAV file of integers ({reason}). Install soundfile to read other "
            "formats, or decode it yourself and pass (samples, rate)."
        ) from error
    try:
        samples, rate = soundfile.read(file, frames=MAX_SAMPLES + 1, always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:  # LibsndfileError is a RuntimeError
        raise AudioError(f"{name}: not audio that can be read ({error}).") from error
    return np.asarray(samples).mean(axis=1), int(rate)


def _pcm(reader: wave.Wave_read, name: str) -> Array:
    channels, width = reader.getnchannels(), reader.getsampwidth()
    if reader.getnframes() > MAX_SAMPLES:
        raise _too_long(reader.getnframes(), name)
    data = reader.readframes(reader.getnframes())
    data = data[: len(data) - len(data) % (channels * width)]
    if width == 1:  # unsigned
        samples = np.frombuffer(data, np.uint8) / 128.0 - 1
    elif width == 3:
        # Three bytes become the upper three of four.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0] / 2.0**31
    elif width in (2, 4):
        samples = np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)
    else:
        raise AudioError(f"{name}: {8 * width}-bit samples, expected 8, 16, 24 or 32.")
    return np.asarray(samples.reshape(-1, channels).mean(axis=1))


def _check(samples: Array, name: str) -> None:
    if not len(samples):
        raise AudioError(f"{name}: has no samples. Check its source.")
    if len(samples) > MAX_SAMPLES:
        raise _too_long(len(samples), name)
    loudest = float(np.abs(samples).max())  # NaN if any is
    if not math.isfinite(loudest):
        raise AudioError(f"{name}: NaN or infinite samples. Check their source.")
    if loudest > 16:  # far beyond clipping
        raise AudioError(
            f"{name}: samples up to {loudest:g}, expected -1..1. Divide them by full scale, or "
            "pass the int16 array."
        )


def _too_long(samples: int, name: str) -> AudioError:
    return AudioError(
        f"{name}: {samples} samples, more than the {MAX_SAMPLES} allowed. Pass the part that "
        "matters."
    )


def _describe(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return f"Audio '{os.fspath(source)}'"
    if isinstance(source, bytes):
        return f"Audio of {len(source)} bytes"
    return "Audio" if isinstance(source, tuple) else f"Audio of type {type(source).__name__}"
