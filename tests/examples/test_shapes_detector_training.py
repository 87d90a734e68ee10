"""The detector's training: targets, losses and the start from CLIP; and a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes import HELD_OUT, HELD_OUT_WORDINGS, TRAINED, WORDINGS, load_or_render, scene_boxes
from drawing import bounding_box
from small_detector import (
    GRID,
    assign,
    build_detector,
    detect,
    detection_loss,
    embed_queries,
    patch_states,
    to_pixels,
)
from train_detector import batches, parse, tokenise, train
from transformers import CLIPTokenizerFast, OwlViTForObjectDetection
from world import COLOURS, LABELS, SHAPES, scenes

CLIP = Path(__file__).parents[2] / "examples" / "shapes" / "clip"


@pytest.fixture(scope="module")
def model() -> OwlViTForObjectDetection:
    torch.manual_seed(0)
    return build_detector(CLIP).eval()


def test_every_colour_and_shape_is_held_out_once() -> None:
    assert sorted(label.split()[0] for label in HELD_OUT) == sorted(COLOURS)
    assert sorted(label.split()[1] for label in HELD_OUT) == sorted(SHAPES)
    assert set(TRAINED) == set(LABELS) - set(HELD_OUT)
    assert not set(WORDINGS) & set(HELD_OUT_WORDINGS)


def test_rendered_scenes_are_cached_and_hold_nothing_held_out(tmp_path: Path) -> None:
    first = load_or_render(tmp_path, 40, seed=3)
    assert first.pixels.shape == (40, 64, 64, 3)
    counts = (first.labels >= 0).sum(axis=1)
    assert counts.min() >= 1
    assert counts.max() <= 4
    sides = first.boxes[..., 2:] - first.boxes[..., :2]
    assert ((sides > 0.1).all(axis=-1) == (first.labels >= 0)).all()
    again = load_or_render(tmp_path, 40, seed=3)
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.boxes, again.boxes)


def test_a_mirrored_image_has_mirrored_boxes(tmp_path: Path) -> None:
    data = load_or_render(tmp_path, 8, seed=3)
    pixels, boxes, labels = next(batches(data, 8, np.random.default_rng(0)))
    boxes, plain = boxes.numpy(), data.boxes
    real = labels.numpy() >= 0
    turned = np.abs(boxes - plain).max(axis=(1, 2)) > 1e-6
    assert 0 < turned.sum() < 8
    mirrored = plain[..., [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]
    assert np.abs((boxes - mirrored)[turned][real[turned]]).max() < 1e-6
    unturned = to_pixels(data.pixels)
    for row, each in enumerate(turned):
        assert torch.equal(pixels[row], unturned[row].flip(-1) if each else unturned[row])


def test_a_thing_belongs_to_the_patch_under_its_middle() -> None:
    scene = scenes("train", 1, kind="quad")[0]
    boxes, labels = scene_boxes(scene, LABELS)
    targets = assign(torch.from_numpy(boxes)[None], torch.from_numpy(labels.astype(np.int64))[None])
    expected = {}
    for thing in scene.things:
        left, top, right, bottom = bounding_box(thing)
        row, column = int((top + bottom) / 2 * GRID), int((left + right) / 2 * GRID)
        expected[row * GRID + column] = LABELS.index(thing.label)
        patch = targets.boxes[0, row * GRID + column]
        assert torch.allclose(patch, torch.tensor((left, top, right, bottom)))
    found = targets.labels[0]
    assert {int(at): int(found[at]) for at in (found >= 0).nonzero()} == expected
    assert (targets.weight[0][found >= 0] == 1).all()
    kept = targets.worth_seeing(32)
    assert len(set(kept[0].tolist())) == 32
    seen = targets.at(kept)
    assert (seen.labels >= 0).sum() == len(expected)
    assert (seen.weight > 0).sum() == (targets.weight > 0).sum()


def test_the_right_boxes_and_labels_cost_least() -> None:
    boxes, labels = scene_boxes(scenes("train", 1, kind="trio")[0], LABELS)
    targets = assign(torch.from_numpy(boxes)[None], torch.from_numpy(labels.astype(np.int64))[None])
    corners = targets.boxes
    right = torch.cat(
        [(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1
    )
    logits = torch.full((1, GRID * GRID, len(LABELS)), -12.0)
    (patches,) = (targets.labels[0] >= 0).nonzero(as_tuple=True)
    logits[0, patches, targets.labels[0, patches]] = 12.0
    classes, places, overlap = detection_loss(logits, right, targets)
    assert classes < 1e-3
    assert places < 1e-4
    assert overlap == pytest.approx(1, abs=1e-4)
    moved = right + torch.tensor([0.05, 0, 0, 0])
    assert detection_loss(logits, moved, targets)[1] > 0.3
    assert detection_loss(logits.roll(1, dims=2), right, targets)[0] > 5
    assert detection_loss(logits.roll(1, dims=1), right, targets)[0] > 5


def test_training_runs_the_model_as_transformers_does(model: OwlViTForObjectDetection) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokenizer = CLIPTokenizerFast.from_pretrained(CLIP)
    tokens = tokenise(tokenizer, LABELS[:5], WORDINGS[2])
    every = torch.arange(GRID * GRID).expand(2, -1)
    with torch.no_grad():
        output = model(pixel_values=pixels, input_ids=tokens.repeat(2, 1))
        queries = embed_queries(model.owlvit, tokens)
        logits, boxes = detect(model, patch_states(model.owlvit, pixels), queries)
        hidden = patch_states(model.owlvit, pixels, every)
        kept_logits, kept_boxes = detect(model, hidden, queries, every)
    for ours, other in ((logits, kept_logits), (boxes, kept_boxes)):
        assert torch.allclose(ours, other, atol=1e-5)
    assert torch.allclose(logits, output.logits, atol=1e-4)
    assert torch.allclose(boxes, output.pred_boxes, atol=1e-5)


@pytest.mark.slow
def test_a_few_steps_write_a_folder_that_transformers_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detector"
    arguments = ["--out", str(out), "--cache", str(tmp_path / "cache"), "--scenes", "64"]
    train(parse([*arguments, "--batch", "16", "--workers", "1", "--steps", "3"]))
    model, start = OwlViTForObjectDetection.from_pretrained(out), build_detector(CLIP)
    assert not torch.equal(model.box_head.dense0.weight, start.box_head.dense0.weight)
    texts = (each.owlvit.text_projection.weight for each in (model, start))
    assert torch.equal(*texts)
    lines = capfd.readouterr().out.splitlines()
    assert json.loads([line for line in lines if line.startswith("{")][-1])["step"] == 3
