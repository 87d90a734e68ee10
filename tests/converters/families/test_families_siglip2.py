"""SigLIP 2 NaFlex: images of mixed aspect ratios as with transformers, positions interpolated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from describing import describe
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_naflex import BUDGET, PATCH, write_naflex
from PIL import Image
from transformers import AutoTokenizer, Siglip2ImageProcessorPil, Siglip2Model, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from mmedge import DualEncoder
from mmedge.bundle import open_bundle
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.families.naflex import _weights
from mmedge.errors import InputError, SourceError
from mmedge.preprocess import ImageProcessor
from mmedge.preprocess.patches import patch_grid
from mmedge.preprocess.steps import Patches
from mmedge.sessions.verification import verify_bundle
from mmedge.specs import Array, Modality

TEXTS = ["a red circle", "Blue", "a long text about a green star", "x"]
SIZES = [(64, 48), (240, 320), (17, 500), (5, 5), (64, 64), (200, 30), (30, 200), (99, 100),
         (33, 70), (7, 90)]  # fmt: skip


@dataclass(frozen=True)
class Converted:
    folder: Path
    bundle: Path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The tiny NaFlex in fp32 and int8-dynamic."""
    place = tmp_path_factory.mktemp("naflex")
    folder = write_naflex(place / "source")
    precisions = ("fp32", "int8-dynamic")
    convert(ConvertConfig(str(folder), place / "model.mmedge", precisions=precisions))
    return Converted(folder, place / "model.mmedge")


@pytest.fixture(scope="module")
def encoder(converted: Converted) -> Iterator[DualEncoder]:
    with DualEncoder.load(converted.bundle, precision="fp32") as model:
        yield model


def images(sizes: list[tuple[int, int]] = SIZES) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def reference(folder: Path, frames: list[Array]) -> Any:
    model = Siglip2Model.from_pretrained(folder).eval()
    fed = Siglip2ImageProcessorPil.from_pretrained(folder)(
        [Image.fromarray(frame) for frame in frames], return_tensors="pt"
    )
    texts = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.inference_mode():
        return model(**texts, **fed)


def test_mixed_aspect_ratios_embed_as_with_transformers(
    encoder: DualEncoder, converted: Converted
) -> None:
    expected = reference(converted.folder, images())
    got = encoder.encode_image(images())
    np.testing.assert_allclose(got, expected.image_embeds.numpy(), atol=1e-5)
    assert got.std(axis=0).mean() > 0.01  # they differ
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected.text_embeds.numpy(), atol=1e-5)
    scores = encoder.classify(images(), TEXTS, template="{}").probabilities
    np.testing.assert_allclose(scores, expected.logits_per_image.sigmoid().numpy(), atol=1e-4)
    # Neither what it is batched with nor how it is given matters.
    for one, row in zip(images(), got, strict=True):
        np.testing.assert_allclose(encoder.encode_image(one)[0], row, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_image(images(), batch_size=3), got, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_image(iter(images()), batch_size=4), got, atol=1e-5)


def test_files_boxes_and_prepared_images_are_encoded_alike(
    encoder: DualEncoder, tmp_path: Path
) -> None:
    frames = images(SIZES[:3])
    got = encoder.encode_image(frames)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    np.testing.assert_allclose(encoder.encode_image_files(tmp_path).embeddings, got, atol=1e-6)
    boxes = encoder.encode_boxes(frames[1], [[10, 20, 200, 90]])
    cut = encoder.encode_image(frames[1][20:90, 10:200])
    np.testing.assert_allclose(boxes, cut, atol=1e-6)
    feeds = [encoder.prepare(Modality.IMAGE, frame) for frame in frames]
    joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    np.testing.assert_allclose(encoder.encode_prepared(Modality.IMAGE, joined), got, atol=1e-6)
    with pytest.raises(InputError, match="spatial_shapes"):
        encoder.encode_image(np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(InputError, match="the model takes patches"):
        encoder.image_processor.into(frames, np.zeros((3, 3, 16, 16), np.float32))


def test_int8_opens_runs_and_is_near(converted: Converted, encoder: DualEncoder) -> None:
    assert all(result.passed for result in verify_bundle(open_bundle(converted.bundle)))
    with DualEncoder.load(converted.bundle, precision="int8-dynamic") as small:
        assert (small.encode_image(images()) * encoder.encode_image(images())).sum(1).min() > 0.97
        assert (small.encode_text(TEXTS) * encoder.encode_text(TEXTS)).sum(1).min() > 0.97


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (1, 20), (3, 6), (7, 9), (20, 2), (2, 2), (5, 3)])
def test_positions_are_interpolated_as_torch_does(grid: tuple[int, int]) -> None:
    rows, columns = grid
    table = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        table.permute(2, 0, 1)[None], size=grid, mode="bilinear", antialias=True
    )
    got = interpolated(table, rows, columns)
    torch.testing.assert_close(got, expected[0].flatten(1).T, atol=1e-5, rtol=0)


def interpolated(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    number = torch.arange(rows * columns)[None]
    down = _weights(number // columns, torch.tensor([[rows]]), len(table))
    across = _weights(number % columns, torch.tensor([[columns]]), len(table))
    return torch.einsum("bni,bnj,ijd->nd", down, across, table)


def test_one_column_of_patches_is_one_row_turned() -> None:
    """On a CPU, torch 2.13 repeats the first row of a single column; a single row is right."""
    table = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    turned = interpolated(table.transpose(0, 1), 1, 20)
    torch.testing.assert_close(interpolated(table, 20, 1), turned, atol=1e-6, rtol=0)


@settings(max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1024), st.sampled_from([14, 16]))
def test_grids_are_those_of_transformers(width: int, height: int, count: int, size: int) -> None:
    step = Patches(size=size, count=count, resample="bilinear")
    rows, columns = patch_grid(step, width, height)
    expected = get_image_size_for_max_num_patches(height, width, size, count)
    assert (rows * size, columns * size) == expected
    assert 1 <= rows * columns <= count


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_num_patches": 0}, r"max_num_patches: got 0, expected .*1 to 16384"),
        ({"max_num_patches": 1_000_000}, r"max_num_patches: got 1000000, expected .*1 to 16384"),
        ({"max_num_patches": "256"}, r"max_num_patches: got '256'"),
        ({"patch_size": 16}, "patch_size: got 16, expected 8, the patch_size of the model"),
        ({"do_resize": False}, "do_resize: got False, expected true"),
    ],
)
def test_budgets_that_cannot_be_are_refused(
    settings_: dict[str, object], message: str, converted: Converted, tmp_path: Path
) -> None:
    copy = shutil.copytree(converted.folder, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings_))
    with pytest.raises(SourceError, match=message):
        describe(copy)


def test_the_budget_is_that_of_the_processor(converted: Converted, tmp_path: Path) -> None:
    copy = shutil.copytree(converted.folder, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_num_patches": 6}))
    spec = describe(copy).spec
    shapes = [item.shape for item in spec.roles["image_encoder"]().inputs]
    assert shapes == [("batch", 6, 3 * PATCH**2), ("batch", 2)]
    config = describe(converted.folder).spec.processors["image"]
    made = ImageProcessor(config)(images())  # type: ignore[arg-type]
    assert made["pixel_values"].shape == (len(SIZES), BUDGET, 3 * PATCH**2)
    assert (made["spatial_shapes"].prod(axis=1) <= BUDGET).all()


def test_a_tower_alone_is_taken(converted: Converted, tmp_path: Path) -> None:
    Siglip2VisionModel.from_pretrained(converted.folder).save_pretrained(tmp_path / "vision")
    shutil.copy(converted.folder / "preprocessor_config.json", tmp_path / "vision")
    spec = describe(tmp_path / "vision").spec
    assert list(spec.kind.encoders) == [Modality.IMAGE]  # type: ignore[union-attr]
    assert spec.roles["image_encoder"]().outputs[0].shape == ("batch", 32)
