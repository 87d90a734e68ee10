"""AudioProcessor against transformers' feature extractors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from mmedge.errors import AudioError, InputError
from mmedge.preprocess import AudioConfig
from mmedge.preprocess.audio import AudioProcessor
from mmedge.preprocess.steps import FitLength, LogMel
from mmedge.specs import Array

RATE = 48_000
SECONDS = 2  # CLAP takes 10; the arithmetic is the same


def clap_config(
    truncation: Literal["rand_trunc", "fusion"],
    pad: Literal["zeros", "repeat", "repeat_zeros"] = "repeat_zeros",
) -> AudioConfig:
    fusion = truncation == "fusion"
    return AudioConfig(
        sampling_rate=RATE,
        steps=(
            FitLength(samples=SECONDS * RATE, pad=pad, truncate="fusion" if fusion else "centre"),
            LogMel(
                fft_size=1024,
                hop=480,
                mels=64,
                min_hz=50,
                max_hz=14_000,
                scale="htk" if fusion else "slaney",
                norm=None if fusion else "slaney",
                log="db",
            ),
        ),
    )


WHISPER = AudioConfig(
    sampling_rate=16_000,
    steps=(
        FitLength(samples=5 * 16_000, pad="zeros", truncate="first"),
        LogMel(
            fft_size=400,
            hop=160,
            mels=80,
            min_hz=0,
            max_hz=8000,
            scale="slaney",
            norm="slaney",
            log="whisper",
        ),
    ),
)


def sound(samples: int, rate: int = RATE) -> Array:
    """A chirp in noise, with a silent stretch."""
    time = np.arange(samples) / rate
    noise = np.random.default_rng(samples).normal(0, 0.01, samples)
    wave = 0.4 * np.sin(2 * np.pi * (200 + 900 * time) * time) + noise
    wave[samples // 2 : samples // 2 + samples // 10] = 0
    return wave.astype(np.float32)


@contextmanager
def middle_instead_of_random(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the reference take the middle of every range that it would draw from."""
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "randint", lambda low, high: (low + high - 1) // 2)
        patch.setattr(np.random, "choice", lambda values: values[len(values) // 2])
        yield


def clap_reference(config: Any, samples: Array, monkeypatch: pytest.MonkeyPatch) -> Any:
    extractor = ClapFeatureExtractor(max_length_s=SECONDS, frequency_min=50, **config)
    with middle_instead_of_random(monkeypatch):
        return extractor(samples, sampling_rate=RATE, return_tensors="np")


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("length", [300, 30_000, 48_000, 95_999, 96_000, 96_001, 96_480, 97_000])
def test_clap_equals_the_reference(
    length: int, truncation: Literal["rand_trunc", "fusion"], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = sound(length)
    expected = clap_reference({"truncation": truncation}, samples, monkeypatch)
    got = AudioProcessor(clap_config(truncation))([(samples, RATE)])
    assert got["input_features"].dtype == np.float32
    assert got["input_features"].shape == expected["input_features"].shape
    np.testing.assert_allclose(got["input_features"], expected["input_features"], atol=1e-4)


@pytest.mark.parametrize("length", [97_500, 144_000, 300_000])
def test_claps_fusion_of_long_audio_equals_the_reference(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = sound(length)
    expected = clap_reference({"truncation": "fusion"}, samples, monkeypatch)
    got = AudioProcessor(clap_config("fusion"))([(samples, RATE)])["input_features"]
    assert got.shape == (1, 4, SECONDS * 100 + 1, 64)
    np.testing.assert_allclose(got, expected["input_features"], atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("zeros", "pad"), ("repeat", "repeat"), ("repeat_zeros", "repeatpad")]
)
def test_every_padding_equals_the_reference(
    ours: Literal["zeros", "repeat", "repeat_zeros"], theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = sound(40_000)
    settings = {"truncation": "rand_trunc", "padding": theirs}
    expected = clap_reference(settings, samples, monkeypatch)["input_features"]
    got = AudioProcessor(clap_config("rand_trunc", ours))([(samples, RATE)])["input_features"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("length", [100, 20_000, 80_000, 80_001, 120_000])
def test_whisper_equals_the_reference(length: int) -> None:
    samples = sound(length, 16_000)
    extractor = WhisperFeatureExtractor(chunk_length=5)
    expected = extractor(samples, sampling_rate=16_000, return_tensors="np")["input_features"]
    got = AudioProcessor(WHISPER)([(samples, 16_000)])["input_features"]
    assert got.shape == expected.shape == (1, 80, 500)
    assert got.flags.c_contiguous
    # The reference's torch path works in single precision.
    np.testing.assert_allclose(got, expected, atol=2e-4)
    by_numpy = extractor._np_extract_fbank_features(
        [np.resize(np.pad(samples, (0, max(0, 80_000 - length))), 80_000)], "cpu"
    )
    np.testing.assert_allclose(got, by_numpy, atol=1e-6)


def test_nothing_is_random_and_a_batch_equals_its_items() -> None:
    processor = AudioProcessor(clap_config("fusion"))
    items = [(sound(30_000), RATE), (sound(200_000), RATE)]
    batch = processor(items)
    for position, item in enumerate(items):
        alone = processor([item])
        np.testing.assert_array_equal(batch["input_features"][position], alone["input_features"][0])


def test_misuse_is_explained() -> None:
    processor = AudioProcessor(WHISPER)
    with pytest.raises(InputError, match=r"Pass \[audio\]"):
        processor("a.wav")
    with pytest.raises(InputError, match=r"Pass \[audio\]"):
        processor((sound(10), RATE))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got none"):
        processor([])
    with pytest.raises(AudioError, match=r"^audio\[1\]: .*NaN"):
        processor([(sound(1000), RATE), (np.full(9, np.nan), RATE)])
