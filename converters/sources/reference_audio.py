"""Freezing of transformers' audio feature extractors, compared with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from mmedge.converters.sources.clean import clean_copy
from mmedge.converters.sources.config import Fields, foreign_errors
from mmedge.converters.sources.source import Source
from mmedge.errors import ExportError, SourceError
from mmedge.preprocess.audio import AudioProcessor
from mmedge.preprocess.config import AudioConfig
from mmedge.preprocess.steps import FitLength, LogMel
from mmedge.specs import Array

__all__ = [
    "audio_reference_inputs",
    "check_audio_preprocessing",
    "read_audio_preprocessing",
]

_FILE = "preprocessor_config.json"
_PADDING: dict[object, Literal["zeros", "repeat", "repeat_zeros"]] = {
    "pad": "zeros",
    "repeat": "repeat",
    "repeatpad": "repeat_zeros",
}
# Of the range of a spectrogram: Whisper's reference works in single precision.
_ALLOWED = 2e-4


def read_audio_preprocessing(source: Source) -> AudioConfig:
    """Freeze the feature extractor of transformers: CLAP's or Whisper's.

    Args:
        source: The original.

    Raises:
        SourceError: If it is missing, of another kind, or asks for what mmedge does not have.
    """
    extractor = _load(source)
    settings = Fields(source.folder / _FILE, extractor.to_dict())
    kind = type(extractor).__name__
    if kind not in ("ClapFeatureExtractor", "WhisperFeatureExtractor"):
        raise SourceError(
            f"{source.folder / _FILE}: {kind} is not known, expected ClapFeatureExtractor or "
            "WhisperFeatureExtractor."
        )
    steps = _clap(settings) if kind == "ClapFeatureExtractor" else _whisper(settings)
    try:
        return AudioConfig(
            sampling_rate=settings.integer("sampling_rate", 1000, 384_000),
            steps=steps,
        )
    except ValidationError as error:
        reason = "; ".join(each["msg"] for each in error.errors())
        raise SourceError(f"{source.folder / _FILE}: {reason}. Correct the file.") from error


def audio_reference_inputs(
    source: Source, config: AudioConfig
) -> tuple[list[tuple[Array, int]], dict[str, torch.Tensor]]:
    """Return noise that fades, and what the source's own processor gives for each sound alone.

    Audio that is too long is left out where the reference takes a random part of it.

    Raises:
        SourceError: If the processor refuses them.
    """
    reference, rate = _load(source), config.sampling_rate
    samples = config.length.samples
    lengths = [samples // 7, samples // 2, samples]
    if config.length.truncate == "first":
        lengths.append(samples + rate // 3)
    rng = np.random.default_rng(0)
    sounds: list[tuple[Array, int]] = []
    made = []
    for length in lengths:
        noise = 0.3 * np.linspace(1, 0.01, length) * rng.standard_normal(length)
        sounds.append((noise.clip(-1, 1).astype(np.float32), rate))
        with foreign_errors(f"{source.folder / _FILE}: transformers rejects it", "Correct it."):
            made.append(reference(sounds[-1][0], sampling_rate=rate, return_tensors="np"))
    rows = {name: np.concatenate([np.asarray(one[name]) for one in made]) for name in made[0]}
    rows["input_features"] = rows["input_features"].astype(np.float32)
    return sounds, {name: torch.from_numpy(array) for name, array in rows.items()}


def check_audio_preprocessing(source: Source, config: AudioConfig, folder: Path) -> None:  # noqa: ARG001
    """Compare the frozen preprocessing with transformers' on noise that fades.

    Raises:
        ExportError: If a value differs.
    """
    ours = AudioProcessor(config)
    sounds, given = audio_reference_inputs(source, config)
    for (sound, rate), row in zip(sounds, given["input_features"].numpy(), strict=True):
        expected, length = row[None], len(sound)
        got = ours([(sound, rate)])[config.input]
        spread = float(np.ptp(expected)) or 1.0
        error = np.abs(got - expected).max() if got.shape == expected.shape else np.inf
        if not error <= _ALLOWED * spread:
            raise ExportError(
                f"{source.name}: {length} samples become {got.shape}, with transformers "
                f"{expected.shape}; they differ by {error:.3g} of {spread:.3g}, {_ALLOWED:g} of it "
                "is allowed. The preprocessing cannot be frozen."
            )


def _clap(settings: Fields) -> tuple[FitLength, LogMel]:
    rate = settings.integer("sampling_rate", 1000, 384_000)
    fusion = settings.choice("truncation", {"rand_trunc": False, "fusion": True})
    length = FitLength(
        samples=settings.integer("max_length_s", 1, 40) * rate,
        pad=settings.choice("padding", _PADDING),
        truncate="fusion" if fusion else "centre",
    )
    # The scales of torchaudio and librosa, as the reference chooses them.
    log_mel = LogMel(
        fft_size=settings.integer("fft_window_size", 16, 65_536),
        hop=settings.integer("hop_length", 1, 65_536),
        mels=settings.integer("feature_size", 1, 1024),
        min_hz=settings.number("frequency_min", -1e-9, 2e5),
        max_hz=settings.number("frequency_max", 0, 2e5),
        scale="htk" if fusion else "slaney",
        norm=None if fusion else "slaney",
        log="db",
    )
    return length, log_mel


def _whisper(settings: Fields) -> tuple[FitLength, LogMel]:
    for key in ("dither", "padding_value"):
        if settings.values.get(key):
            raise settings.error(key, "0")
    rate = settings.integer("sampling_rate", 1000, 384_000)
    samples = settings.integer("chunk_length", 1, 40) * rate
    log_mel = LogMel(
        fft_size=settings.integer("n_fft", 16, 65_536),
        hop=settings.integer("hop_length", 1, 65_536),
        mels=settings.integer("feature_size", 1, 1024),
        min_hz=0,
        max_hz=8000,
        scale="slaney",
        norm="slaney",
        log="whisper",
    )
    return FitLength(samples=samples, pad="zeros", truncate="first"), log_mel


def _load(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor

    with (
        foreign_errors(
            f"{source.folder / _FILE}: the feature extractor cannot be loaded",
            "Put the preprocessor_config.json of the model into the folder.",
        ),
        clean_copy(source.folder) as folder,
    ):
        return AutoFeatureExtractor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
