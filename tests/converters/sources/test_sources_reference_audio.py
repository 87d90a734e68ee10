"""CLAP's and Whisper's feature extractors, read and compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ClapFeatureExtractor, SpeechT5FeatureExtractor, WhisperFeatureExtractor

from mmedge.converters.sources.reference_audio import (
    check_audio_preprocessing,
    read_audio_preprocessing,
)
from mmedge.converters.sources.source import Source
from mmedge.errors import ExportError, SourceError

EXTRACTORS: dict[str, Any] = {
    "clap": lambda: ClapFeatureExtractor(max_length_s=1, truncation="rand_trunc"),
    "clap fusion": lambda: ClapFeatureExtractor(max_length_s=1, truncation="fusion"),
    "clap repeat": lambda: ClapFeatureExtractor(
        max_length_s=1, truncation="rand_trunc", padding="repeat", frequency_min=50
    ),
    "whisper": lambda: WhisperFeatureExtractor(chunk_length=1),
    "whisper large": lambda: WhisperFeatureExtractor(chunk_length=2, feature_size=128),
}


def source_of(folder: Path, extractor: Any, **changes: object) -> Source:
    extractor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Source(folder, folder.name, None, {}, (), {})


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractors_are_read_and_equal(name: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, EXTRACTORS[name]())
    config = read_audio_preprocessing(source)
    check_audio_preprocessing(source, config, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("clap", {"hop": 441}),
        ("clap", {"scale": "htk"}),
        ("clap", {"norm": None}),
        ("clap fusion", {"max_hz": 13_000.0}),
        ("whisper", {"mels": 81}),
    ],
)
def test_another_spectrogram_is_refused(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    source = source_of(tmp_path, EXTRACTORS[name]())
    config = read_audio_preprocessing(source)
    length, log_mel = config.steps
    other = config.model_copy(update={"steps": (length, log_mel.model_copy(update=changes))})
    with pytest.raises(ExportError, match="The preprocessing cannot be frozen"):
        check_audio_preprocessing(source, other, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("clap", {"truncation": "longest"}, "truncation: got 'longest', expected one of rand_tr"),
        ("clap", {"padding": "reflect"}, "padding: got 'reflect'"),
        ("clap", {"frequency_max": 24_500}, "above half the sampling rate"),
        ("clap", {"max_length_s": 10**9}, "max_length_s"),
        ("whisper", {"dither": 0.1}, "dither: got 0.1, expected 0"),
        ("whisper", {"chunk_length": 10**9}, "chunk_length|cannot be loaded"),
    ],
)
def test_settings_that_cannot_be_stored_are_named(
    name: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path, EXTRACTORS[name](), **changes)
    with pytest.raises(SourceError, match=reason):
        read_audio_preprocessing(source)


def test_another_extractor_is_named(tmp_path: Path) -> None:
    source = source_of(tmp_path, SpeechT5FeatureExtractor())
    with pytest.raises(SourceError, match="SpeechT5FeatureExtractor is not known"):
        read_audio_preprocessing(source)


def test_a_missing_extractor_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the feature extractor cannot be loaded"):
        read_audio_preprocessing(Source(tmp_path, "x", None, {}, (), {}))
