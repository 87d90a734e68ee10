"""Digits spoken by formant synthesis: harmonics of a voice, and noise bursts, in numpy.

Every phone has three formants, how much it is voiced, and a band of noise. Targets glide into each
other, which is what tells most digits apart. It is made for a small model, not to please an ear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Samples: TypeAlias = npt.NDArray[Any]

_FRAME_S = 0.005
_BANDWIDTHS_HZ = (80.0, 110.0, 170.0)
_TOP_HZ = 4200.0


class _Phone(NamedTuple):
    """Formants in Hz, relative length, voicing and noise from 0 to 1, band of the noise in Hz."""

    formants: tuple[float, float, float]
    length: float
    voiced: float = 1.0
    noise: float = 0.0
    band: tuple[float, float] = (100.0, 7000.0)


_PHONES: dict[str, _Phone] = {
    "iy": _Phone((300, 2250, 2950), 1.2),
    "ih": _Phone((420, 1950, 2550), 0.7),
    "eh": _Phone((560, 1800, 2500), 0.8),
    "ah": _Phone((650, 1200, 2450), 0.9),
    "ax": _Phone((520, 1350, 2450), 0.5),
    "ao": _Phone((560, 850, 2450), 1.1),
    "a": _Phone((720, 1200, 2500), 0.8),
    "e": _Phone((480, 2000, 2600), 0.7),
    "o": _Phone((540, 950, 2400), 0.7),
    "u": _Phone((330, 900, 2250), 1.2),
    "uh": _Phone((400, 800, 2350), 0.6),
    "w": _Phone((310, 680, 2200), 0.6, 0.7),
    "r": _Phone((350, 1100, 1500), 0.7, 0.8),
    "n": _Phone((280, 1250, 2300), 0.7, 0.5),
    "v": _Phone((280, 1100, 2200), 0.5, 0.45, 0.12, (1500, 7000)),
    "z": _Phone((280, 1700, 2600), 0.6, 0.4, 0.35, (4300, 7700)),
    "s": _Phone((280, 1700, 2600), 0.9, 0.0, 0.8, (4500, 7800)),
    "f": _Phone((300, 1100, 2300), 0.8, 0.0, 0.22, (1400, 7500)),
    "th": _Phone((300, 1400, 2500), 0.7, 0.0, 0.14, (2200, 7800)),
    "k": _Phone((350, 1800, 2400), 0.3, 0.0, 0.6, (1500, 3200)),
    "t": _Phone((350, 1800, 2600), 0.3, 0.0, 0.7, (3000, 7500)),
    "-": _Phone((350, 1800, 2600), 0.35, 0.0),
}
_DIGITS: tuple[tuple[str, ...], ...] = (
    ("z", "ih", "r", "o", "uh"),
    ("w", "ah", "n"),
    ("t", "u", "uh"),
    ("th", "r", "iy"),
    ("f", "ao", "r"),
    ("f", "a", "ih", "v"),
    ("s", "ih", "-", "k", "s"),
    ("s", "eh", "v", "ax", "n"),
    ("e", "ih", "-", "t"),
    ("n", "a", "ih", "n"),
)


@dataclass(frozen=True)
class Speaker:
    """Pitch in Hz, a factor of all formants, and breath from 0 to 1."""

    pitch_hz: float
    formants: float
    breath: float


def speaker(voice: str, rng: np.random.Generator) -> Speaker:
    """Draw a speaker with a "deep" or a "high" voice."""
    low, high, formants = (85.0, 130.0, 0.96) if voice == "deep" else (190.0, 270.0, 1.12)
    pitch, jitter = rng.uniform(low, high), rng.uniform(0.96, 1.04)
    return Speaker(float(pitch), float(formants * jitter), float(rng.uniform(0.0, 0.08)))


def say(digit: int, by: Speaker, seconds: float, rate: int, rng: np.random.Generator) -> Samples:
    """Speak one digit.

    Args:
        digit: 0 to 9.
        by: Who speaks.
        seconds: How long the word takes.
        rate: Hz of the samples.
        rng: Where chance comes from: the melody, lengths of phones and noise.

    Returns:
        (N,) float64, its loudest sample 1.
    """
    phones = [_PHONES[name] for name in _DIGITS[digit]]
    lengths = np.array([phone.length for phone in phones]) * rng.uniform(0.85, 1.15, len(phones))
    ends = np.cumsum(lengths) / lengths.sum() * seconds
    middles = ends - np.diff(ends, prepend=0.0) / 2
    times = np.arange(round(seconds / _FRAME_S)) * _FRAME_S
    tracks = np.array([phone.formants for phone in phones]).T * by.formants
    formants = np.stack([np.interp(times, middles, track) for track in tracks])
    voiced = _steps(times, ends, [phone.voiced for phone in phones])
    at = np.arange(round(seconds * rate)) / rate
    melody = by.pitch_hz * (1 + rng.uniform(-0.06, 0.06)) * np.interp(at, [0, seconds], [1.06, 0.9])
    sound = _harmonics(melody, formants, voiced, by, at, times, rate)
    for phone, end, length in zip(phones, ends, np.diff(ends, prepend=0.0), strict=True):
        if phone.noise:
            hiss = noise(phone.band, len(at), rate, rng)
            sound += 0.5 * phone.noise * hiss * _window(at, end - length, end)
    sound += by.breath * noise((800, 6000), len(at), rate, rng) * np.interp(at, times, voiced) * 0.2
    sound *= np.minimum(1, np.minimum(at, seconds - at) / 0.008)
    loudest: Samples = sound / np.abs(sound).max()
    return loudest


def noise(band: tuple[float, float], count: int, rate: int, rng: np.random.Generator) -> Samples:
    """Return (count,) samples of noise within a band of Hz, of standard deviation 1."""
    whole = 1 << (count - 1).bit_length()  # a length that transforms fast
    spectrum = np.fft.rfft(rng.standard_normal(whole))
    frequencies = np.fft.rfftfreq(whole, 1 / rate)
    spectrum[(frequencies < band[0]) | (frequencies > band[1])] = 0
    samples = np.fft.irfft(spectrum, whole)[:count]
    return np.asarray(samples / max(float(samples.std()), 1e-9))


def _harmonics(
    melody: Samples,
    formants: Samples,
    voiced: Samples,
    by: Speaker,
    at: Samples,
    times: Samples,
    rate: int,
) -> Samples:
    """Add the voice's harmonics, each as loud as the formants make it."""
    pitch = np.interp(times, at, melody)
    numbers = np.arange(1, int(_TOP_HZ / by.pitch_hz) + 1)
    levels = np.full((len(numbers), len(times)), 0.02)
    for index, (centre, width) in enumerate(zip(formants, _BANDWIDTHS_HZ, strict=True)):
        levels += 1 / (1 + ((numbers[:, None] * pitch - centre) / width) ** 2) / (1 + index)
    levels *= voiced / numbers[:, None] ** 0.5
    sound = np.zeros_like(at)
    for level, wave in zip(levels, overtones(2 * np.pi * np.cumsum(melody) / rate), strict=False):
        sound += np.interp(at, times, level) * wave
    return sound


def overtones(phase: Samples) -> Iterator[Samples]:
    """Yield sin(n * phase) for n = 1, 2, 3, ...; each costs two operations."""
    twice, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    while True:
        yield now
        before, now = now, twice * now - before


def _steps(times: Samples, ends: Samples, values: list[float]) -> Samples:
    """Return each phone's value over time, with edges of about 20 ms."""
    levels = np.array(values)[np.searchsorted(ends[:-1], times, side="right")]
    return np.convolve(np.pad(levels, 2, mode="edge"), np.ones(5) / 5, mode="valid")


def _window(at: Samples, start: float, end: float) -> Samples:
    return np.clip(np.minimum(at - start, end - at) / 0.006, 0, 1)
