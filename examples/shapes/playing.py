"""Sounds to samples: tones and digits one after another, in a noisy room."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sounds import Sound, Tone
from speech import Samples, noise, overtones, say, speaker

RATE = 16_000
MOST_SECONDS = 2

_PITCH_HZ = {"low": (300.0, 390.0), "high": (900.0, 1200.0)}
_LEVEL = {"quiet": 0.09, "loud": 0.45}
_EDGE_S = 0.012
_TOP_HZ = 0.47 * RATE


def play(sound: Sound) -> npt.NDArray[np.float32]:
    """Play a sound: a pure function of it.

    Returns:
        (N,) float32 in -1..1 at ``RATE``, at most ``MOST_SECONDS`` long.
    """
    rng = np.random.default_rng(sound.take)
    tempo = rng.uniform(0.85, 1.15)
    by = None if sound.voice is None else speaker(sound.voice, rng)
    parts = [_pause(rng.uniform(0.02, 0.1))]
    for event in sound.events:
        seconds = rng.uniform(0.27, 0.33) * tempo
        if isinstance(event, Tone):
            parts.append(tone(event, seconds, rng))
        elif by is not None:
            level = 0.35 * 10 ** (rng.uniform(-2, 2) / 20)
            parts.append(level * say(event.value, by, seconds, RATE, rng))
        parts.append(_pause(rng.uniform(0.05, 0.08) * tempo))
    parts.append(_pause(rng.uniform(0.0, 0.1)))
    samples = np.concatenate(parts)
    samples += 10 ** rng.uniform(-3.2, -2.4) * noise((60, 7900), len(samples), RATE, rng)
    return np.asarray(np.clip(samples, -1, 1), np.float32)


def tone(event: Tone, seconds: float, rng: np.random.Generator) -> Samples:
    """Play one tone at its level.

    Returns:
        (N,) float64 at ``RATE``.
    """
    at = np.arange(round(seconds * RATE)) / RATE
    hz = rng.uniform(*_PITCH_HZ[event.register]) * _bend(event.contour, at / seconds, rng)
    phase = 2 * np.pi * np.cumsum(hz) / RATE + rng.uniform(0, 2 * np.pi)
    samples = _timbre(event.timbre, phase, hz, at, seconds, rng)
    samples *= np.minimum(1, np.minimum(at, seconds - at) / _EDGE_S)
    level = _LEVEL[event.loudness] * 10 ** (rng.uniform(-2, 2) / 20)
    return np.asarray(level * samples / np.abs(samples).max())


def _bend(contour: str, share: Samples, rng: np.random.Generator) -> Samples:
    """Return the factor of the pitch over a tone, which ``share`` runs through from 0 to 1."""
    wide = rng.uniform(0.55, 0.75)
    if contour == "rising":
        return 2.0 ** (wide * (share - 0.5))
    if contour == "falling":
        return 2.0 ** (wide * (0.5 - share))
    if contour == "wavering":
        return 2.0 ** (0.22 * np.sin(2 * np.pi * (2.0 * share + rng.uniform())))
    return np.ones_like(share)


def _timbre(
    name: str, phase: Samples, hz: Samples, at: Samples, seconds: float, rng: np.random.Generator
) -> Samples:
    if name == "hum":
        return np.asarray(np.sin(phase) + 0.15 * np.sin(2 * phase))
    if name == "buzz":
        return _harmonics(phase, hz, [n % 2 / n**0.6 for n in range(1, 24)])
    if name == "bell":
        partials = [(1.0, 1.0), (2.76, 0.7), (5.4, 0.5), (8.93, 0.3)]
        return sum(
            (level * np.sin(multiple * phase) * (multiple * hz < _TOP_HZ))
            for multiple, level in partials
        ) * np.exp(-at * 5.0 / seconds)
    if name == "chirp":
        pips = 0.5 - 0.5 * np.cos(2 * np.pi * 16 * at)
        return np.asarray((np.sin(phase) + 0.4 * np.sin(3 * phase)) * pips**2)
    if name == "rasp":
        rough = np.clip(1 + 0.8 * noise((20, 120), len(at), RATE, rng), 0, None)
        return _harmonics(phase, hz, [1 / n**0.7 for n in range(1, 24)]) * rough
    if name == "throb":
        slow = 0.5 - 0.5 * np.cos(2 * np.pi * 2.5 * at / seconds)
        return np.asarray((np.sin(phase) + 0.5 * np.sin(2 * phase)) * slow)
    if name == "horn":
        return _harmonics(phase, hz, [1 / n for n in range(1, 7)]) * (at / seconds) ** 0.7
    # A band of noise around the pitch: noise that modulates a carrier.
    carrier = noise((5, 110), len(at), RATE, rng) * np.sin(phase)
    return carrier + 0.2 * noise((3000, 7500), len(at), RATE, rng)


def _harmonics(phase: Samples, hz: Samples, levels: list[float]) -> Samples:
    """Add harmonics of these levels, below the Nyquist frequency."""
    total = np.zeros_like(phase)
    for number, (level, wave) in enumerate(zip(levels, overtones(phase), strict=False), start=1):
        total += level * wave * (number * hz < _TOP_HZ)
    return total


def _pause(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE))
