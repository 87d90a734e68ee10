"""The committed CLAP: it loads offline, finds unseen sounds, and its outliers hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clap_rows import CLAP, clap_rows, exchanged
from encoder_rows import write_outliers
from generate_sounds import captioned_sounds
from metrics import recall_at_k
from playing import RATE, play
from safetensors.torch import load_file
from small_clap import MAX_TOKENS, build_model, build_tokenizer, fix_norm, set_training
from sound_captions import sound_caption
from sounds import Digit, Sound, Tone, sounds
from transformers import ClapFeatureExtractor, ClapModel, RobertaTokenizerFast

from mmedge.specs import Array

Embedded = tuple[Array, Array]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Sound, str]]:
    return captioned_sounds("test", 120, seed=3)


def embed(folder: Path, pairs: list[tuple[Sound, str]]) -> Embedded:
    """Embed sounds and captions by transformers' own ways: both (N, D), L2-normalised."""
    model = ClapModel.from_pretrained(folder).eval()
    extract = ClapFeatureExtractor.from_pretrained(folder)
    tokenizer = RobertaTokenizerFast.from_pretrained(folder)
    played = [play(sound) for sound, _ in pairs]
    mels = [extract(samples, sampling_rate=RATE, return_tensors="pt") for samples in played]
    tokens = tokenizer([text for _, text in pairs], padding=True, return_tensors="pt")
    with torch.inference_mode():
        features = torch.cat([mel["input_features"] for mel in mels])
        audio = model.get_audio_features(input_features=features).pooler_output
        texts = model.get_text_features(**tokens).pooler_output
    return audio.numpy(), texts.numpy()


@pytest.fixture(scope="module")
def embedded(pairs: list[tuple[Sound, str]]) -> Embedded:
    return embed(CLAP, pairs)


def test_unseen_sounds_are_found_by_captions_worded_as_none_in_training(embedded: Embedded) -> None:
    audio, texts = embedded
    assert recall_at_k(texts, audio, 1) >= 0.9
    assert recall_at_k(audio, texts, 1) >= 0.9


def test_a_wrong_caption_is_further_from_a_sound(
    pairs: list[tuple[Sound, str]], embedded: Embedded
) -> None:
    audio, texts = embedded
    own = (audio * texts).sum(axis=1)
    others = (audio * np.roll(texts, 1, axis=0)).sum(axis=1)
    assert len(pairs) == len(own)
    assert (own > others).mean() > 0.95


def test_the_copy_with_outliers_computes_the_same(
    pairs: list[tuple[Sound, str]], embedded: Embedded, tmp_path: Path
) -> None:
    folder = write_outliers(CLAP, tmp_path)
    for ours, theirs in zip(embedded, embed(folder, pairs[:16]), strict=True):
        np.testing.assert_allclose(ours[:16], theirs, atol=2e-5)
    plain, scaled = (load_file(each / "model.safetensors") for each in (CLAP, folder))
    largest = {
        name: float(scaled[name].abs().max() / plain[name].abs().max())
        for name in plain
        if name.endswith(("layernorm_before.weight", "layernorm_after.weight"))
    }
    assert len(largest) == 12  # two in each of six blocks
    assert min(largest.values()) > 10


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in CLAP.iterdir()}
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names >= wanted | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in CLAP.iterdir()) < 6e6
    weights = load_file(CLAP / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_no_caption_is_truncated() -> None:
    tokenizer = RobertaTokenizerFast.from_pretrained(CLAP)
    rng = np.random.default_rng(0)
    some = sounds("train", 100, kind="tones") + sounds("test", 100, kind="mixed")
    longest = [one for one in some if len(one.events) == 4]
    texts = [sound_caption(one, rng, unseen=u) for one in longest for u in (True, False)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= MAX_TOKENS
    assert tokenizer.model_max_length == MAX_TOKENS


def test_training_starts_from_the_statistics_of_the_sounds() -> None:
    tokenizer = build_tokenizer(["a loud low steady hum", "a deep voice saying one two"])
    model = build_model(tokenizer)
    assert tokenizer.decode(tokenizer("a low hum é").input_ids[1:-1]) == "a low hum é"
    mels = torch.randn(4, 50, 64) * 20 - 30
    fix_norm(model, mels)
    set_training(model, training=True)
    norm = model.audio_model.audio_encoder.batch_norm
    assert model.training
    assert not norm.training
    made = norm(mels.transpose(1, 2)[..., None])
    torch.testing.assert_close(made.mean(dim=(0, 2, 3)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std(dim=(0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)


def test_unlike_neighbours_are_exchanged() -> None:
    buzz, bell = (Tone(name, "low", "steady", "loud") for name in ("buzz", "bell"))
    swapped = exchanged(Sound((Digit(3), buzz, buzz, bell), "deep", 0))
    assert swapped is not None
    assert swapped.events == (Digit(3), buzz, bell, buzz)
    assert exchanged(Sound((Digit(3), buzz, buzz), "deep", 0)) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_figures_hold_through_bundles_in_fp32_and_int8(tmp_path: Path) -> None:
    rows = clap_rows(0, 500, tmp_path)
    assert {row.passed for row in rows} == {True, None}
    assert any(row.control and row.caught for row in rows)
