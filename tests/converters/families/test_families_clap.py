"""CLAP: sounds and texts in one space, from transformers' files to a bundle that encodes."""

from __future__ import annotations

import io
import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from describing import describe
from models.tiny_models import CLAP_CONTEXT, CLAP_RATE, write_clap
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

import mmedge
from mmedge.bundle import open_bundle
from mmedge.converters.families.reference import check_reference
from mmedge.errors import AudioError, InputError, ShapeError, SourceError
from mmedge.models import verify_bundle
from mmedge.models.dual_encoder import DualEncoder
from mmedge.preprocess.waveform import load_waveform
from mmedge.specs import Array

CAPTIONS = ["a low tone", "a", "a very high tone in noise", "x" * 60]


def wav(samples: Array, rate: int) -> bytes:
    """Return a WAV file of 16 bits; samples (N,) or (N, channels)."""
    out = io.BytesIO()
    with wave.open(out, "wb") as writer:
        writer.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


@pytest.fixture(scope="module")
def encoder(clap_bundle: Path) -> Iterator[DualEncoder]:
    with mmedge.load(clap_bundle, precision="fp32") as model:
        assert isinstance(model, DualEncoder)
        yield model


def reference_audio(folder: Path, sounds: list[Array]) -> Array:
    """Embeddings of transformers' model, each sound prepared alone."""
    model = ClapModel.from_pretrained(folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    rows = []
    for sound in sounds:
        given = extractor(sound, sampling_rate=CLAP_RATE, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model.get_audio_features(**given).pooler_output)
    return torch.cat(rows).numpy()


def test_sounds_embed_as_with_transformers(
    encoder: DualEncoder, clap_bundle: Path, clap_folder: Path
) -> None:
    paths = sorted((clap_bundle.parent / "held-out").glob("*.wav"))
    sounds = [load_waveform(path, CLAP_RATE)[:CLAP_RATE] for path in paths]
    expected = reference_audio(clap_folder, sounds)
    got = encoder.encode_audio([(sound, CLAP_RATE) for sound in sounds])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert expected.std(axis=0).mean() > 0.05  # they differ
    short = [i for i, path in enumerate(paths) if len(load_waveform(path, CLAP_RATE)) < CLAP_RATE]
    files = encoder.encode_audio([paths[i] for i in short])
    np.testing.assert_allclose(files, expected[short], atol=1e-4)


def test_texts_embed_as_with_transformers(encoder: DualEncoder, clap_folder: Path) -> None:
    model = ClapModel.from_pretrained(clap_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(clap_folder)
    given = tokenizer(
        CAPTIONS, padding=True, truncation=True, max_length=CLAP_CONTEXT, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model.get_text_features(**given).pooler_output.numpy()
    np.testing.assert_allclose(encoder.encode_text(CAPTIONS), expected, atol=1e-4)
    # Padding to the longest text of a call has no effect.
    np.testing.assert_allclose(encoder.encode_text(CAPTIONS[0]), expected[:1], atol=1e-4)


def test_sounds_are_classified_by_their_embeddings(encoder: DualEncoder) -> None:
    second = np.sin(np.arange(CLAP_RATE) * 0.5).astype(np.float32)
    found = encoder.classify(encoder.encode_audio((second, CLAP_RATE)), ["low", "high"])
    np.testing.assert_allclose(found.probabilities.sum(), 1, rtol=1e-6)
    with pytest.raises(InputError, match="holds no image_encoder"):
        encoder.encode_image(np.zeros((8, 8, 3), np.uint8))


def test_audio_of_another_rate_embeds_alike(encoder: DualEncoder) -> None:
    """440 Hz for half a second, sampled at 8 to 48 kHz, in an array and in a file."""

    def tone(rate: int) -> Array:
        time = np.arange(rate // 2) / rate
        return np.sin(2 * np.pi * 440 * time).astype(np.float32) * 0.5

    expected = encoder.encode_audio((tone(CLAP_RATE), CLAP_RATE))
    other = encoder.encode_audio((tone(CLAP_RATE)[::2], CLAP_RATE))  # an octave higher
    for rate in (11_025, 44_100, 48_000):
        for source in ((tone(rate), rate), wav(tone(rate), rate)):
            found = encoder.encode_audio(source)
            assert float((found @ expected.T).item()) > 0.999
            assert np.abs(found - expected).max() < 0.2 * np.abs(other - expected).max()


def test_channels_of_an_array_are_refused_and_those_of_a_file_averaged(
    encoder: DualEncoder,
) -> None:
    rng = np.random.default_rng(0)
    channels = (rng.standard_normal((CLAP_RATE // 2, 3)) * 0.1).astype(np.float32)
    for array in (channels, channels.T):
        with pytest.raises(ShapeError, match=r"one channel\. Average the channels"):
            encoder.encode_audio((array, CLAP_RATE))
    mean = encoder.encode_audio((channels.mean(axis=1), CLAP_RATE))
    np.testing.assert_allclose(encoder.encode_audio(wav(channels, CLAP_RATE)), mean, atol=2e-3)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_audio_that_is_not_finite_is_refused(encoder: DualEncoder, broken: float) -> None:
    sound = np.zeros(CLAP_RATE, np.float32)
    sound[7] = broken
    with pytest.raises(AudioError, match="NaN or infinite samples"):
        encoder.encode_audio((sound, CLAP_RATE))
    fine = (np.ones(CLAP_RATE, np.float32) * 0.1, CLAP_RATE)
    with pytest.raises(AudioError, match=r"^audio\[1\]: .*NaN or infinite"):
        encoder.encode_audio([fine, (sound, CLAP_RATE)])


def test_silence_embeds_as_with_transformers(encoder: DualEncoder, clap_folder: Path) -> None:
    silence = np.zeros(CLAP_RATE // 2, np.float32)
    found = encoder.encode_audio((silence, CLAP_RATE))
    np.testing.assert_allclose(found, reference_audio(clap_folder, [silence]), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-5)
    tone = (np.sin(np.arange(CLAP_RATE) * 0.3).astype(np.float32), CLAP_RATE)
    together = encoder.encode_audio([(silence, CLAP_RATE), tone])
    np.testing.assert_allclose(together[:1], found, atol=1e-5)
    np.testing.assert_allclose(together[1:], encoder.encode_audio(tone), atol=1e-5)


def test_the_bundle_is_verified_and_judged_on_retrieval(clap_bundle: Path) -> None:
    bundle = open_bundle(clap_bundle)
    assert all(result.passed for result in verify_bundle(bundle))
    for name in ("audio_encoder", "text_encoder"):
        fp32, int8 = bundle.manifest.roles[name].variants
        assert (fp32.name, int8.name) == ("fp32", "int8-dynamic")
        quality = int8.quality
        assert quality is not None
        assert {"text_to_audio_recall@5", "audio_to_text_recall@5"} <= set(quality.figures)
        assert quality.figures["cosine_min"].value > 0.98


def test_long_audio_is_fused(tmp_path: Path) -> None:
    described = describe(write_clap(tmp_path / "fused", fusion=True))
    processors = described.freeze(tmp_path / "out")
    spec = described.spec.roles["audio_encoder"]()
    assert spec.inputs[0].shape[1] == 4
    reference = described.spec.references["audio_encoder"]
    check_reference(described.source, "audio_encoder", spec, processors, reference)
    features = spec.sample({"batch": 3}, 1)["input_features"]
    assert spec.module is not None
    with torch.inference_mode():
        got = spec.module(features)
        expected = reference(input_features=features, is_longer=torch.ones(3, 1) == 1).pooler_output
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        features[:, 1:] *= 0.5
        assert (spec.module(features) - got).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("preprocessor_config.json", {"feature_size": 8}, "51 frames of 8 mels.* of 16 mels"),
        ("preprocessor_config.json", {"hop_length": 80}, "101 frames .* up to 64 frames"),
        ("preprocessor_config.json", {"truncation": "fusion"}, "fusion True;.* fusion False"),
        ("config.json", {"vocab_size": 100}, "the embedding table has 100 rows|is .261, 32."),
    ],
)
def test_files_of_different_models_are_refused(
    file: str, changes: dict[str, object], reason: str, clap_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clap_folder, tmp_path / "copy")
    values = json.loads((folder / file).read_text())
    part = values["text_config"] if file == "config.json" else values
    part.update(changes)
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(SourceError, match=reason):
        describe(folder)
