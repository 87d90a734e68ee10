"""Sounds of the world: same seed, same sound; no sound in two splits; captions that are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from generate_sounds import captioned_scenes, main
from playing import MOST_SECONDS, RATE, play, tone
from sound_captions import DIGITS, sound_caption
from sound_dataset import (
    CAPTIONS_PER_SOUND,
    FRAMES,
    HEADS,
    MELS,
    decibels,
    extractor,
    facts,
    load_or_play,
    presence,
)
from sounds import (
    CONTOURS,
    PITCHES,
    REGISTERS,
    TIMBRES,
    VOICES,
    Digit,
    Sound,
    Tone,
    near_miss,
    sound_of,
    sounding_scenes,
    sounds,
    tone_of,
)
from speech import say, speaker
from world import COLOURS, SHAPES, SIZES, SPLITS, Scene, Split, Thing, scenes

from mmedge.converters.data.datasets import read_dataset
from mmedge.preprocess.waveform import load_waveform
from mmedge.specs import Array

GREY = (140, 140, 140)


def _thing(x: float, colour: str, shape: str, size: str = "large") -> Thing:
    return Thing(colour, shape, size, x, 0.5, 0.1, 0.0, COLOURS[colour])


def _pitches(samples: Array) -> Array:
    """Return the frequency of the largest peak over time, in Hz."""
    windows = samples[: len(samples) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    peaks = np.abs(np.fft.rfft(windows, 4096)).argmax(axis=1)
    return np.asarray(peaks * RATE / 4096)


@pytest.mark.parametrize("split", list(SPLITS))
def test_sounds_belong_to_their_split_and_are_all_different(split: Split) -> None:
    found = sounds(split, 80, seed=5)
    assert found == sounds(split, 80, seed=5)
    assert found[:20] == sounds(split, 20, seed=5)
    assert {sound.split() for sound in found} == {split}
    assert len({sound.content() for sound in found}) == 80
    assert found != sounds(split, 80, seed=6)
    assert {sound.voice is None for sound in found} == {True, False}


def test_what_a_thing_looks_like_decides_how_it_sounds() -> None:
    things = [
        _thing(0.5, colour, shape, size) for colour in COLOURS for shape in SHAPES for size in SIZES
    ]
    assert len({tone_of(thing) for thing in things}) == len(things)
    pair = Scene((_thing(0.8, "red", "star"), _thing(0.2, "blue", "ring", "small")), GREY, GREY)
    assert sound_of(pair).events == (
        Tone("horn", "high", "steady", "quiet"),
        Tone("chirp", "low", "steady", "loud"),
    )


def test_sounding_scenes_are_new_in_image_and_sound() -> None:
    found = sounding_scenes("test", 30)
    assert all(scene.split() == sound_of(scene).split() == "test" for scene in found)
    assert len({sound_of(scene).content() for scene in found}) == 30


def test_near_misses_differ_and_stay_in_the_split() -> None:
    rng = np.random.default_rng(0)
    for sound in sounds("train", 60):
        other = near_miss(sound, rng)
        assert other is not None
        assert other.split() == "train"
        assert other.content() != sound.content()
        changed = [a != b for a, b in zip(sound.events, other.events, strict=True)]
        voices = sound.voice != other.voice
        assert sum(changed) + voices in (1, 2)
        assert sum(changed) < 2 or (
            sorted(map(repr, sound.events)) == sorted(map(repr, other.events))
        )


def test_playing_is_a_pure_function_within_the_range() -> None:
    for sound in sounds("calibration", 40):
        samples = play(sound)
        assert samples.dtype == np.float32
        assert 0.3 * RATE < len(samples) <= MOST_SECONDS * RATE
        assert 0.03 < np.abs(samples).max() <= 1
        np.testing.assert_array_equal(samples, play(sound))
        again = play(Sound(sound.events, sound.voice, sound.take + 1))
        assert len(again) != len(samples) or not np.array_equal(again, samples)


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize("contour", CONTOURS)
def test_a_tone_has_its_pitch_contour_and_loudness(register: str, contour: str) -> None:
    for seed in range(4):
        made = {
            loudness: tone(
                Tone("hum", register, contour, loudness), 0.4, np.random.default_rng(seed)
            )
            for loudness in ("quiet", "loud")
        }
        assert np.abs(made["loud"]).max() > 2 * np.abs(made["quiet"]).max()
        heard = _pitches(made["loud"])[1:-1]
        assert (heard.mean() > 600) == (register == "high")
        steps = np.diff(heard)
        if contour == "steady":
            assert np.ptp(heard) < 0.03 * heard.mean()
        elif contour == "wavering":
            assert steps.min() < 0 < steps.max()
        else:
            assert (heard[-1] > heard[0]) == (contour == "rising")
            assert abs(heard[-1] / heard[0] - 1) > 0.2


def test_timbres_differ_in_their_spectrum_or_envelope() -> None:
    """The mean spectrogram of a timbre is nearer to another take of it than to other timbres."""
    extract = extractor()

    def heard(timbre: str, seed: int) -> Array:
        made = tone(Tone(timbre, "low", "steady", "loud"), 0.4, np.random.default_rng(seed))
        mel = extract(made, sampling_rate=RATE, return_tensors="np")["input_features"][0, 0, :25]
        return np.asarray(np.concatenate([mel.mean(axis=0), mel.max(axis=1), mel.min(axis=1)]))

    first, second = ([heard(name, seed) for name in TIMBRES.values()] for seed in (0, 1))
    distances = np.array([[np.abs(a - b).mean() for b in second] for a in first])
    assert (distances.argmin(axis=1) == np.arange(len(TIMBRES))).all()


@pytest.mark.parametrize("voice", VOICES)
def test_digits_are_spoken_at_the_pitch_of_the_voice(voice: str) -> None:
    made = []
    for value in range(10):
        rng = np.random.default_rng(value)
        by = speaker(voice, rng)
        word = say(value, by, 0.4, RATE, rng)
        assert np.isfinite(word).all()
        assert np.abs(word).max() == pytest.approx(1)
        # The vowel repeats with the period of the voice.
        vowel = word[len(word) // 2 :][:1600]
        echo = np.correlate(vowel, vowel, "full")[len(vowel) - 1 :]
        period = RATE / by.pitch_hz
        around = echo[int(0.8 * period) : int(1.25 * period)].max()
        made.append(around / echo[0])
    assert (by.pitch_hz > 150) == (voice == "high")
    assert np.median(made) > 0.5


def test_captions_name_the_digits_in_order() -> None:
    rng = np.random.default_rng(1)
    for sound in sounds("train", 40, kind="digits"):
        words = sound_caption(sound, rng, unseen=False).split()
        said = [DIGITS.index(word) for word in words if word in DIGITS]
        assert said == [event.value for event in sound.events if isinstance(event, Digit)]


def test_captions_count_tones_in_a_row() -> None:
    buzz = Tone("buzz", "low", "rising", "loud")
    hiss = Tone("hiss", "high", "steady", "quiet")
    seen = {
        sound_caption(Sound((buzz, buzz, buzz, hiss), None, 0), np.random.default_rng(i), unseen=u)
        for i in range(40)
        for u in (True, False)
    }
    assert len(seen) > 60
    assert all("three" in text and ("buzzes" in text or "buzzers" in text) for text in seen)
    assert all("hiss" in text or "rush" in text for text in seen)


def test_wordings_of_the_test_split_are_not_those_of_training() -> None:
    def worded(unseen: bool) -> set[str]:
        rng = np.random.default_rng(3)
        sound = sounds("test", 1, kind="digits")[0]
        return {sound_caption(sound, rng, unseen=unseen) for _ in range(600)}

    seen, unseen = worded(unseen=False), worded(unseen=True)
    assert min(len(seen), len(unseen)) > 8
    assert not seen & unseen


def test_facts_and_presence_state_what_is_heard() -> None:
    some = sounds("train", 60)
    heard = np.stack([facts(sound) for sound in some])
    assert heard.shape == (60, len(HEADS))
    assert (heard <= np.array(HEADS)).all()
    found = presence(heard)
    pitches, timbres = list(PITCHES.values()), list(TIMBRES.values())
    for sound, row in zip(some, found, strict=True):
        expected = set()
        for event in sound.events:
            if isinstance(event, Digit):
                expected.add(80 + event.value)
                continue
            timbre = timbres.index(event.timbre)
            expected.add(8 * timbre + pitches.index((event.register, event.contour)))
            expected.add(64 + 2 * timbre + ("quiet", "loud").index(event.loudness))
        if sound.voice is not None:
            expected.add(90 + VOICES.index(sound.voice))
        assert set(np.flatnonzero(row)) == expected


def test_training_hears_what_the_extractor_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        """A pool whose jobs run in this process."""

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def imap(self, function: Callable[[object], object], jobs: list[object]) -> object:
            return map(function, jobs)

    monkeypatch.setattr("chunks.multiprocessing.get_context", lambda _: Context)

    class Context:
        Pool = Here

    made = load_or_play(tmp_path, 6, seed=2)
    assert made.levels.shape == (6, FRAMES, MELS)
    assert [len(texts) for texts in made.captions] == [CAPTIONS_PER_SOUND] * 6
    again = load_or_play(tmp_path, 6, seed=2)
    np.testing.assert_array_equal(again.levels, made.levels)
    assert again.captions == made.captions
    for first, second in pairwise(made.facts):
        assert (first != second).any()
    levels = decibels(np.array(made.levels))
    assert levels.min() == -100  # silence behind the sound
    assert levels.max() > -20


def test_a_written_folder_is_read_by_the_converter(tmp_path: Path) -> None:
    main(["--split", "calibration", "--count", "6", "--scenes", "--out", str(tmp_path)])
    data = read_dataset(tmp_path)
    expected = captioned_scenes("calibration", 6)
    assert [sample.caption for sample in data.samples] == [text for _, text, _ in expected]
    for sample, (sound, _, _) in zip(data.samples, expected, strict=True):
        assert sample.image is not None
        assert sample.audio is not None
        np.testing.assert_allclose(load_waveform(sample.audio, RATE), play(sound), atol=1e-4)
    main(["--count", "3", "--kind", "digits", "--out", str(tmp_path / "digits")])
    lines = (tmp_path / "digits" / "captions.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"audio", "caption"}] * 3


def test_scenes_of_the_world_sound_as_long_as_they_may() -> None:
    for scene in scenes("test", 10, kind="quad"):
        assert len(play(sound_of(scene))) <= MOST_SECONDS * RATE
