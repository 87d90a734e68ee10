"""Captions of a sound, in several wordings, some of which training never sees."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from sounds import Digit, Event, Sound, Tone

_OPENINGS = (
    "", "the sound of ", "a recording of ", "we hear ", "there is ", "audio of ", "listen to ",
)  # fmt: skip
_JOINERS = (" then ", ", then ", " followed by ", " and then ", " before ", ", after that ")
_STYLES = 4
_COUNTS = {2: "two", 3: "three", 4: "four"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WORDS: dict[str, tuple[str, ...]] = {
    "hum": ("hum", "drone"),
    "buzz": ("buzz", "buzzer"),
    "bell": ("bell", "chime"),
    "chirp": ("chirp", "twitter"),
    "rasp": ("rasp", "growl"),
    "throb": ("throb", "pulse"),
    "horn": ("horn", "trumpet"),
    "hiss": ("hiss", "rush"),
    "low": ("low", "deep"),
    "high": ("high", "shrill"),
    "steady": ("steady", "even"),
    "rising": ("rising", "climbing"),
    "falling": ("falling", "sinking"),
    "wavering": ("wavering", "trembling"),
    "quiet": ("quiet", "soft"),
    "loud": ("loud", "strong"),
}


def held_out(opening: int, style: int) -> bool:
    """Return whether an opening with a style is kept from training: a fifth of these pairs."""
    return (opening + 2 * style) % 5 == 0


def sound_caption(sound: Sound, rng: np.random.Generator, *, unseen: bool) -> str:
    """Describe every event of a sound, in order.

    Args:
        sound: What is heard.
        rng: Chooses opening, order of words, joints and synonyms.
        unseen: Word it as no training caption is, or else as one is: see ``held_out``.
    """
    while True:
        opening, style = int(rng.integers(len(_OPENINGS))), int(rng.integers(_STYLES))
        if held_out(opening, style) == unseen:
            break
    parts = []
    for first, group in groupby(sound.events, lambda e: e if isinstance(e, Tone) else Digit):
        run = list(group)
        if isinstance(first, Tone):
            parts.append(_tones(first, len(run), style, rng))
        else:
            parts.append(_speech(run, str(sound.voice), style, rng))
    text = parts[0]
    for part in parts[1:]:
        text += _pick(_JOINERS, rng) + part
    return _OPENINGS[opening] + text


def _tones(tone: Tone, count: int, style: int, rng: np.random.Generator) -> str:
    """Name one tone, or several of a kind in a row."""
    loudness, register = _word(tone.loudness, rng), _word(tone.register, rng)
    contour, timbre = _word(tone.contour, rng), _word(tone.timbre, rng)
    if count > 1:
        timbre += "es" if timbre.endswith(("s", "z", "sh")) else "s"
    body = (
        f"{loudness} {register} {contour} {timbre}",
        f"{contour} {loudness} {timbre} at {register} pitch",
        f"{register} {timbre}, {contour} and {loudness}",
        f"{loudness} {timbre}, {register} and {contour}",
    )[style]
    if count > 1:
        return f"{_COUNTS[count]} {body}"
    return f"{'an' if body[0] in 'aeiou' else 'a'} {body}"


def _speech(run: list[Event], voice: str, style: int, rng: np.random.Generator) -> str:
    said = " ".join(DIGITS[event.value] for event in run if isinstance(event, Digit))
    who = f"a {_pick({'deep': ('deep', 'low'), 'high': ('high', 'light')}[voice], rng)} voice"
    return (
        f"{who} saying {said}",
        f"{who} reading {said}",
        f"the {'digits' if len(run) > 1 else 'digit'} {said} in {who}",
        f"{said} spoken by {who}",
    )[style]


def _word(meaning: str, rng: np.random.Generator) -> str:
    return _pick(_WORDS[meaning], rng)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
