"""The training script: its parts do what they say, and a run of a few steps goes through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from captions import caption
from dataset import IMAGE_SIZE, PATCH_SIZE, load_or_render, patch_kinds
from naming import PATCH_HEADS, patch_loss, patches_worth_seeing, window_around_a_thing
from small_clip import build_model, embed_images, embed_tokens
from train_clip import parse, train
from transformers import CLIPModel, CLIPTokenizerFast
from vocabulary import MAX_TOKENS, build_tokenizer
from world import COLOURS, SHAPES, SIZES, scenes

GRID = IMAGE_SIZE // PATCH_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizerFast:
    rng = np.random.default_rng(0)
    return build_tokenizer([caption(scene, rng) for scene in scenes("train", 200)])


@pytest.fixture(scope="module")
def model(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


def test_patch_kinds_name_the_thing_under_a_patch() -> None:
    scene = scenes("train", 1, kind="single")[0]
    thing = scene.things[0]
    kinds = patch_kinds(scene)
    index = int(thing.y * GRID) * GRID + int(thing.x * GRID)
    number = int(kinds[index]) - 1
    assert SHAPES[number % len(SHAPES)] == thing.shape
    assert list(COLOURS)[number // len(SHAPES) % len(COLOURS)] == thing.colour
    assert list(SIZES)[number // len(SHAPES) // len(COLOURS)] == thing.size
    assert 0 < (kinds > 0).sum() < 16


def test_naming_rightly_costs_nothing() -> None:
    kinds = torch.arange(1 + len(SIZES) * len(COLOURS) * len(SHAPES))
    right = []
    for kind in kinds.tolist():
        parts = [torch.zeros(size) for size in PATCH_HEADS]
        number = kind - 1
        shape, rest = number % len(SHAPES), number // len(SHAPES)
        named = (rest // len(COLOURS), rest % len(COLOURS), shape)
        for part, value in zip(parts, named, strict=True):
            part[value + 1 if kind else 0] = 50.0
        right.append(torch.cat(parts))
    assert patch_loss(torch.stack(right), kinds).item() < 1e-6
    assert patch_loss(torch.stack(right).roll(1, 0), kinds).item() > 10


def test_windows_hold_a_thing_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    kinds = np.stack([patch_kinds(scene) for scene in scenes("train", 50)]).astype(np.int64)
    windows = window_around_a_thing(kinds, rng)
    assert windows.shape == (50, 16)
    assert windows.min() >= 0
    assert windows.max() < GRID * GRID
    assert (np.take_along_axis(kinds, windows, axis=1) > 0).any(axis=1).all()


def test_no_thing_is_left_out_of_sight() -> None:
    rng = np.random.default_rng(0)
    kinds = np.stack([patch_kinds(scene) for scene in scenes("train", 100)]).astype(np.int64)
    kept = patches_worth_seeing(kinds, rng)
    assert kept.shape == (100, 32)
    assert all(len(set(row)) == 32 for row in kept.tolist())
    seen = np.take_along_axis(kinds, kept, axis=1)
    assert ((seen > 0).sum(axis=1) == (kinds > 0).sum(axis=1)).all()


def test_training_runs_the_towers_as_transformers_does(
    model: CLIPModel, tokenizer: CLIPTokenizerFast
) -> None:
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    texts = ["a red star", "a large blue heart at the top left", "two small rings and a star"]
    rows = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **rows)
        images, patches = embed_images(model, pixels)
        every = torch.arange(GRID * GRID).expand(3, -1)
        images_again, _ = embed_images(model, pixels, every)
        tokens = embed_tokens(model, rows.input_ids)
    assert patches.shape == (3, GRID * GRID, 128)
    assert torch.allclose(images, output.image_embeds, atol=1e-5)
    assert torch.allclose(images, images_again, atol=1e-5)
    assert torch.allclose(tokens, output.text_embeds, atol=1e-5)


def test_rendered_scenes_are_cached(tmp_path: Path) -> None:
    first = load_or_render(tmp_path, 24, seed=3)
    again = load_or_render(tmp_path, 24, seed=3)
    assert first.pixels.shape == (24, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.captions == again.captions
    assert len(first.captions) == 24
    assert np.array_equal(first.pixels, again.pixels)


@pytest.mark.slow
def test_a_few_steps_write_a_folder_that_transformers_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip"
    arguments = ["--out", str(out), "--cache", str(tmp_path / "cache"), "--scenes", "64"]
    arguments += ["--batch", "16", "--workers", "1"]
    train(parse([*arguments, "--steps", "3"]))
    model, tokenizer = CLIPModel.from_pretrained(out), CLIPTokenizerFast.from_pretrained(out)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    train(parse([*arguments, "--steps", "5", "--resume"]))
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["step"] for line in lines if line.startswith("{")] == [3, 5]
