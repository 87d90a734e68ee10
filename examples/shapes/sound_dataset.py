"""Training sounds played once and kept on disk as spectrograms, so that no step waits for them.

Sounds take the way they take at inference: played at 16 kHz, then CLAP's own feature extractor.
The folder is a cache and lives outside the project.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from chunks import in_chunks
from playing import MOST_SECONDS, RATE, play
from sound_captions import sound_caption
from sounds import (
    CONTOURS,
    LOUDNESS,
    MOST_EVENTS,
    REGISTERS,
    TIMBRES,
    VOICES,
    Digit,
    Sound,
    draw_sound,
    near_miss,
)
from transformers import ClapFeatureExtractor
from world import SPLITS

MELS, HOP = 64, 256
FRAMES = MOST_SECONDS * RATE // HOP + 1
CAPTIONS_PER_SOUND = 5
SOURCES = (*TIMBRES.values(), *range(10))
"""What an event may come from: a timbre, or a spoken digit."""
HEADS = (*([len(SOURCES), len(REGISTERS), len(CONTOURS), len(LOUDNESS)] * MOST_EVENTS), len(VOICES))
"""Choices of each fact about a sound, besides "none": see ``facts``."""
PRESENCES = len(TIMBRES) * (len(REGISTERS) * len(CONTOURS) + len(LOUDNESS)) + 10 + len(VOICES)
"""Columns of ``presence``."""
_STEP_DB, _FLOOR_DB = 0.5, -100.0
_CHUNK = 250


@dataclass(frozen=True)
class SoundDataset:
    """Sounds that have been played; entries 2i and 2i + 1 differ in one respect (``near_miss``).

    Attributes:
        levels: (N, frames, mels) uint8, half decibels above -100: see ``decibels``.
        facts: (N, 17) uint8, what is heard, from ``facts``.
        captions: N lists of ``CAPTIONS_PER_SOUND`` texts.
    """

    levels: npt.NDArray[np.uint8]
    facts: npt.NDArray[np.uint8]
    captions: list[list[str]]


def extractor() -> ClapFeatureExtractor:
    """Return the preprocessing that goes with the model: two seconds in 126 frames of 64 mels."""
    return ClapFeatureExtractor(
        feature_size=MELS,
        sampling_rate=RATE,
        hop_length=HOP,
        max_length_s=MOST_SECONDS,
        fft_window_size=512,
        frequency_min=50,
        frequency_max=7800,
        truncation="rand_trunc",
        padding="pad",
    )


def facts(sound: Sound) -> npt.NDArray[np.uint8]:
    """Return what is heard: for each of four events four facts, then the voice.

    Returns:
        (17,) uint8: 0 for none, else 1 + the position among the choices of ``HEADS``.
    """
    found: list[int] = []
    for event in sound.events:
        if isinstance(event, Digit):
            found += [1 + SOURCES.index(event.value), 0, 0, 0]
        else:
            found += [
                1 + SOURCES.index(event.timbre),
                1 + REGISTERS.index(event.register),
                1 + CONTOURS.index(event.contour),
                1 + list(LOUDNESS.values()).index(event.loudness),
            ]
    found += [0] * (len(HEADS) - 1 - len(found))
    voice = 0 if sound.voice is None else 1 + VOICES.index(sound.voice)
    return np.array([*found, voice], np.uint8)


def presence(heard: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return which digits, timbres at a pitch, timbres at a loudness and voices are heard.

    Args:
        heard: (N, 17), from ``facts``.

    Returns:
        (N, ``PRESENCES``) uint8 of 0 and 1, whatever the order of the events.
    """
    heard = heard.astype(np.int64)
    events = heard[:, :-1].reshape(len(heard), MOST_EVENTS, 4)
    source, register, contour, loudness = np.moveaxis(events, 2, 0)
    pitched = len(TIMBRES) * len(REGISTERS) * len(CONTOURS)
    pitch = ((source - 1) * len(REGISTERS) + register - 1) * len(CONTOURS) + contour - 1
    level = pitched + (source - 1) * len(LOUDNESS) + loudness - 1
    digit = pitched + len(TIMBRES) * len(LOUDNESS) + source - 1 - len(TIMBRES)
    voice = np.where(heard[:, -1:] > 0, PRESENCES - len(VOICES) + heard[:, -1:] - 1, -1)
    tone = (source > 0) & (source <= len(TIMBRES))
    found = np.zeros((len(heard), PRESENCES + 1), np.uint8)
    for index, there in ((pitch, tone), (level, tone), (digit, source > len(TIMBRES)), (voice, 1)):
        # What is not there goes to a last column, which is cut off.
        np.put_along_axis(found, np.where(there, index, -1) % (PRESENCES + 1), 1, axis=1)
    return found[:, :-1]


def decibels(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the spectrograms that levels stand for, within a quarter of a decibel."""
    return levels.astype(np.float32) * np.float32(_STEP_DB) + np.float32(_FLOOR_DB)


def load_or_play(cache: Path, count: int, seed: int) -> SoundDataset:
    """Return ``count`` training sounds, playing them into ``cache`` on the first call."""
    folder = cache / f"sounds-{seed}-{count}"
    if not (folder / "captions.txt").exists():
        _play_all(folder, count, seed)
    lines = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
    texts = [lines[i : i + CAPTIONS_PER_SOUND] for i in range(0, len(lines), CAPTIONS_PER_SOUND)]
    levels = np.load(folder / "levels.npy", mmap_mode="r")
    return SoundDataset(levels, np.load(folder / "facts.npy"), texts)


def _play_all(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    levels = np.lib.format.open_memmap(folder / "levels.npy", "w+", np.uint8, (count, FRAMES, MELS))
    heard = np.zeros((count, len(HEADS)), np.uint8)
    texts: list[str] = []
    for place, chunk in in_chunks(_play_chunk, seed, count, _CHUNK):
        levels[place], heard[place] = chunk.levels, chunk.facts
        texts += [text for sound_texts in chunk.captions for text in sound_texts]
    levels.flush()
    np.save(folder / "facts.npy", heard)
    # Written last: it marks the folder as complete.
    (folder / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def _play_chunk(job: tuple[int, int, int]) -> SoundDataset:
    seed, start, size = job
    extract = extractor()
    levels, heard, texts = [], [], []
    sound: Sound | None = None
    for index in range(start, start + size):
        rng = np.random.default_rng([seed, 11, index])
        other = near_miss(sound, rng) if sound is not None and index % 2 else None
        sound = other or _training_sound(rng)
        mel = extract(play(sound), sampling_rate=RATE, return_tensors="np")["input_features"][0, 0]
        levels.append(np.clip(np.rint((mel - _FLOOR_DB) / _STEP_DB), 0, 255).astype(np.uint8))
        heard.append(facts(sound))
        texts.append([sound_caption(sound, rng, unseen=False) for _ in range(CAPTIONS_PER_SOUND)])
    return SoundDataset(np.stack(levels), np.stack(heard), texts)


def _training_sound(rng: np.random.Generator) -> Sound:
    while True:
        sound = draw_sound(rng)
        if sound.bucket() in SPLITS["train"]:
            return sound
