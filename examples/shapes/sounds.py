"""Sounds of the world: what its things sound like, and spoken digits, with exact ground truth.

A thing's shape chooses the timbre of its tone, its colour the pitch, its size the loudness; a scene
sounds from left to right. Digits are spoken by a deep or a high voice. What is said about a sound
(``sound_captions``) is read from the same events that are played (``playing``).

The content of a sound (its events in order, and the voice) is hashed to a bucket that belongs to
one split only, as with scenes: no test sound was heard in training, not even in another take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from world import SPLITS, Scene, Split, Thing, bucket_of, draw_scene, split_of

SoundKind = Literal["tones", "digits", "mixed"]
SOUND_KINDS: dict[SoundKind, float] = {"tones": 0.5, "digits": 0.3, "mixed": 0.2}
"""Kind of sound to its share."""
TIMBRES: dict[str, str] = {
    "circle": "hum",
    "square": "buzz",
    "triangle": "bell",
    "star": "chirp",
    "cross": "rasp",
    "heart": "throb",
    "ring": "horn",
    "diamond": "hiss",
}
"""Shape to timbre."""
PITCHES: dict[str, tuple[str, str]] = {
    "red": ("low", "steady"),
    "orange": ("low", "rising"),
    "yellow": ("low", "falling"),
    "green": ("low", "wavering"),
    "blue": ("high", "steady"),
    "purple": ("high", "rising"),
    "white": ("high", "falling"),
    "black": ("high", "wavering"),
}
"""Colour to register and contour."""
LOUDNESS: dict[str, str] = {"small": "quiet", "large": "loud"}
"""Size to loudness."""
REGISTERS = ("low", "high")
CONTOURS = ("steady", "rising", "falling", "wavering")
VOICES = ("deep", "high")
MOST_EVENTS = 4


@dataclass(frozen=True)
class Tone:
    """One tone, in the words of ``TIMBRES``, ``PITCHES`` and ``LOUDNESS``."""

    timbre: str
    register: str
    contour: str
    loudness: str


@dataclass(frozen=True)
class Digit:
    """One spoken digit, 0 to 9."""

    value: int


Event: TypeAlias = Tone | Digit


@dataclass(frozen=True)
class Sound:
    """One to four events in a row.

    Attributes:
        events: What sounds, in order.
        voice: Of ``VOICES``; None where nobody speaks.
        take: Seed of all that differs between two recordings of the same events: the speaker,
            tempo, pitch, level and noise.
    """

    events: tuple[Event, ...]
    voice: str | None
    take: int

    def content(self) -> tuple[object, ...]:
        """What is heard, whatever the take."""
        return (self.voice, *self.events)

    def bucket(self) -> int:
        """The content's hash, 0 to 99; it decides which split the sound belongs to."""
        return bucket_of(self.content())

    def split(self) -> Split:
        """The one split that may hold this sound."""
        return split_of(self.bucket())


def tone_of(thing: Thing) -> Tone:
    """Return the tone that a thing makes, wherever it is."""
    return Tone(TIMBRES[thing.shape], *PITCHES[thing.colour], LOUDNESS[thing.size])


def sound_of(scene: Scene, take: int = 0) -> Sound:
    """Return the sound of a scene: its things from left to right."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    return Sound(tuple(tone_of(thing) for thing in things), None, take)


def draw_sound(rng: np.random.Generator, kind: SoundKind | None = None) -> Sound:
    """Draw one sound of the given kind, or of a kind drawn by its share."""
    if kind is None:
        kind = list(SOUND_KINDS)[int(rng.choice(len(SOUND_KINDS), p=list(SOUND_KINDS.values())))]
    take = int(rng.integers(2**62))
    if kind == "tones":
        return sound_of(draw_scene(rng), take)
    voice = VOICES[int(rng.integers(len(VOICES)))]
    if kind == "digits":
        return Sound(_digits(rng, int(rng.integers(2, MOST_EVENTS + 1))), voice, take)
    digits = _digits(rng, int(rng.integers(1, 3)))
    tones = tuple(_any_tone(rng) for _ in range(int(rng.integers(1, 3))))
    first, second = (digits, tones) if rng.random() < 0.5 else (tones, digits)
    return Sound((*first, *second), voice, take)


def sounds(split: Split, count: int, seed: int = 0, kind: SoundKind | None = None) -> list[Sound]:
    """Return ``count`` sounds of a split, no two of the same content.

    A pure function of its arguments.
    """
    found: dict[tuple[object, ...], Sound] = {}
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 41])
    while len(found) < count:
        sound = draw_sound(rng, kind)
        if sound.bucket() in SPLITS[split]:
            found.setdefault(sound.content(), sound)
    return list(found.values())


def sounding_scenes(split: Split, count: int, seed: int = 0) -> list[Scene]:
    """Return scenes of a split whose sounds are of that split too, no two sounds alike.

    Such a scene is new in image and in sound: play ``sound_of(scene)``. A pure function of its
    arguments.
    """
    found: dict[tuple[object, ...], Scene] = {}
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 43])
    while len(found) < count:
        scene = draw_scene(rng)
        sound = sound_of(scene)
        if scene.split() == split and sound.split() == split:
            found.setdefault(sound.content(), scene)
    return list(found.values())


def near_miss(sound: Sound, rng: np.random.Generator) -> Sound | None:
    """Return another take of a sound in which one thing differs, within the same split.

    Two neighbours change places, one event changes in one respect, or another voice speaks.

    Returns:
        The other sound; None where no change of this one stays in its split.
    """
    for _ in range(24):
        other = replace(_change(sound, rng), take=int(rng.integers(2**62)))
        if other.content() != sound.content() and other.split() == sound.split():
            return other
    return None


def _change(sound: Sound, rng: np.random.Generator) -> Sound:
    events = list(sound.events)
    at = int(rng.integers(len(events)))
    choice = rng.random()
    if choice < 0.35 and at + 1 < len(events) and type(events[at]) is type(events[at + 1]):
        events[at], events[at + 1] = events[at + 1], events[at]
    elif choice < 0.5 and sound.voice is not None:
        return replace(sound, voice=VOICES[1 - VOICES.index(sound.voice)])
    else:
        events[at] = _changed(events[at], rng)
    return replace(sound, events=tuple(events))


def _changed(event: Event, rng: np.random.Generator) -> Event:
    if isinstance(event, Digit):
        return Digit((event.value + int(rng.integers(1, 10))) % 10)
    other = _any_tone(rng)
    name = ("timbre", "register", "contour", "loudness")[int(rng.integers(4))]
    return replace(event, **{name: getattr(other, name)})


def _any_tone(rng: np.random.Generator) -> Tone:
    register, contour = list(PITCHES.values())[int(rng.integers(len(PITCHES)))]
    timbre = list(TIMBRES.values())[int(rng.integers(len(TIMBRES)))]
    return Tone(timbre, register, contour, ("quiet", "loud")[int(rng.integers(2))])


def _digits(rng: np.random.Generator, count: int) -> tuple[Digit, ...]:
    return tuple(Digit(int(value)) for value in rng.integers(10, size=count))
