"""Reading and resampling audio."""

from __future__ import annotations

import io
import struct
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.errors import AudioError, DTypeError, InputError, ShapeError
from mmedge.preprocess import waveform
from mmedge.preprocess.waveform import load_waveform, resample
from mmedge.specs import Array


def wav(samples: Array, rate: int = 16_000, width: int = 2) -> bytes:
    """Return a WAV file of integers of `width` bytes; samples (N,) or (N, channels) in -1..1."""
    full = 2 ** (8 * width - 1)
    values = np.clip(np.round(samples * full), -full, full - 1).astype("<i8").reshape(-1)
    if width == 1:
        values = values + 128
    data = values.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(data)
    return buffer.getvalue()


def tone(hz: float, rate: int, seconds: float = 0.5) -> Array:
    return np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width_are_read(width: int, tmp_path: Path) -> None:
    samples = 0.9 * tone(440, 16_000)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(samples, width=width))
    sources: list[Any] = [path, str(path), path.read_bytes(), bytearray(path.read_bytes())]
    for source in (*sources, io.BytesIO(path.read_bytes())):
        got = load_waveform(source, 16_000)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, samples, atol=2.0 ** (1 - 8 * width))


def test_channels_of_a_file_are_averaged() -> None:
    left, right = tone(440, 16_000) / 2, tone(880, 16_000) / 4
    got = load_waveform(wav(np.stack([left, right], axis=1)), 16_000)
    np.testing.assert_allclose(got, (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int32"])
def test_arrays_are_taken_with_their_rate(dtype: str) -> None:
    samples = 0.5 * tone(440, 8000)
    given_array = samples.astype(dtype)
    if dtype.startswith("int"):
        given_array = (samples * np.iinfo(dtype).max).astype(dtype)
    np.testing.assert_allclose(load_waveform((given_array, 8000), 8000), samples, atol=1e-4)


@pytest.mark.parametrize(
    ("rate", "to"),
    [(44_100, 48_000), (48_000, 16_000), (8000, 16_000), (22_050, 48_000), (16_001, 16_000)],
)
def test_tones_keep_their_shape_and_no_alias_comes_in(rate: int, to: int) -> None:
    lower = min(rate, to)
    for hz in (100, 0.2 * lower, 0.44 * lower):  # to nine tenths of the lower Nyquist frequency
        got = resample(tone(hz, rate), rate, to)
        assert len(got) == -(-len(tone(hz, rate)) * to // rate)
        expected = tone(hz, to, len(got) / to + 1 / to)[: len(got)]
        inner = slice(len(got) // 5, -len(got) // 5)  # away from the borders
        np.testing.assert_allclose(got[inner], expected[inner], atol=2e-4)
    if to < rate * 0.8:
        alias = resample(tone(0.55 * to, rate), rate, to)
        assert np.abs(alias[len(alias) // 5 : -len(alias) // 5]).max() < 1e-4  # -80 dB


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 400), rate=st.integers(1000, 50_000), to=st.sampled_from([8000, 16_000])
)
def test_any_length_and_rate_gives_the_right_number_of_samples(
    samples: int, rate: int, to: int
) -> None:
    got = resample(np.ones(samples), rate, to)
    assert len(got) == -(-samples * to // rate)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        (np.zeros(9), InputError, "does not say its sampling rate"),
        ((np.zeros((2, 9)), 8000), ShapeError, r"got \(2, 9\), expected \(samples,\)"),
        ((np.zeros(9, np.uint8), 8000), DTypeError, "uint8"),
        ((np.zeros(9), 8000.0), InputError, "expected Hz as an int"),
        ((np.zeros(9), 5), AudioError, "got 5 Hz"),
        ((np.zeros(9), 10**9), AudioError, "expected 1000 to 384000"),
        ((np.empty(0), 8000), AudioError, "no samples"),
        ((np.array([0, np.nan]), 8000), AudioError, "NaN or infinite"),
        ((np.array([0, np.inf]), 8000), AudioError, "NaN or infinite"),
        ((np.array([0, 20_000.0]), 8000), AudioError, "pass the int16 array"),
        ("gone.wav", AudioError, "Audio 'gone.wav': cannot be read"),
        ("a\0b.wav", AudioError, "cannot be read"),
        (b"", AudioError, "not a WAV file of integers"),
        (b"fLaC" + bytes(50), AudioError, "Install soundfile"),
        (wav(np.zeros(9))[:30], AudioError, "not a WAV file of integers"),
        (wav(np.zeros(0)), AudioError, "no samples"),
        (wav(np.zeros(9), rate=10), AudioError, "got 10 Hz"),
    ],
)
def test_misuse_is_explained(
    source: Any, error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(error, match=reason):
        load_waveform(source, 16_000)


def test_too_long_audio_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveform, "MAX_SAMPLES", 100)
    for source in (wav(np.zeros(101)), (np.zeros(101), 16_000)):
        with pytest.raises(AudioError, match="101 samples, more than the 100 allowed"):
            load_waveform(source, 16_000)


def test_other_formats_are_read_by_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    stereo = np.stack([np.full(5, 0.5), np.full(5, 0.1)], axis=1)

    def read(file: Any, frames: int, *, always_2d: bool) -> tuple[Array, int]:
        if file.read(4) != b"fLaC":
            raise RuntimeError("Format not recognised")
        return stereo, 16_000

    monkeypatch.setitem(sys.modules, "soundfile", SimpleNamespace(read=read))
    np.testing.assert_allclose(load_waveform(b"fLaC...", 16_000), 0.3)
    with pytest.raises(AudioError, match="Format not recognised"):
        load_waveform(b"????", 16_000)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_files_end_in_an_error_that_names_them(data: st.DataObject) -> None:
    intact = bytearray(wav(tone(440, 8000, 0.01), 8000))
    for _ in range(data.draw(st.integers(1, 6))):
        intact[data.draw(st.integers(0, 43))] = data.draw(st.integers(0, 255))
    damaged = bytes(intact[: data.draw(st.integers(0, len(intact)))])
    try:
        got = load_waveform(damaged, 8000)
    except AudioError as error:
        got = np.zeros(1)
        message = str(error)
    else:
        message = f"Audio of {len(damaged)} bytes"
    assert np.isfinite(got).all()
    assert message.startswith(f"Audio of {len(damaged)} bytes")


def test_a_header_with_too_large_sizes_reads_the_rest() -> None:
    whole = bytearray(wav(np.full(100, 0.5)))
    whole[40:44] = struct.pack("<I", 10**8)
    np.testing.assert_allclose(load_waveform(bytes(whole), 16_000), 0.5, atol=1e-4)
