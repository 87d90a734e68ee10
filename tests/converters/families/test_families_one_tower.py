"""Sources that are one tower alone: image-only and text-only bundles."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from describing import describe

import mmedge
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.converters.config import ConvertConfig
from mmedge.converters.families.reference import check_reference
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.request import convert
from mmedge.errors import InputError, SourceError
from mmedge.specs import Modality, Task

CLASSES = (
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "SiglipVisionModel",
    "SiglipTextModel",
)
WEIGHTS = {"model.safetensors", "config.json"}


@pytest.fixture
def write(clip_folder: Path, siglip_folder: Path, tmp_path: Path) -> Any:
    """Writes one tower of a tiny model as transformers does, with its processor's files."""

    def write(name: str) -> tuple[Path, Any]:
        whole = clip_folder if name.startswith("CLIP") else siglip_folder
        folder = tmp_path / name
        with quiet_libraries():
            model = getattr(transformers, name).from_pretrained(whole).eval()
        model.save_pretrained(folder)
        for path in whole.iterdir():
            if path.name not in WEIGHTS and ("preprocessor" in path.name) == ("Vision" in name):
                shutil.copy(path, folder)
        return folder, model

    return write


@pytest.mark.parametrize("name", CLASSES)
def test_a_tower_alone_is_described(name: str, write: Any, tmp_path: Path) -> None:
    folder, _ = write(name)
    described = describe(folder)
    modality = Modality.IMAGE if "Vision" in name else Modality.TEXT
    role = f"{modality.value}_encoder"
    kind = described.spec.kind
    assert isinstance(kind, DualEncoderKind)
    assert kind.encoders == {modality: role}
    assert kind.contrastive_head is None
    assert kind.embedding_dim == (16 if name.endswith("WithProjection") else 32)
    assert described.spec.tasks == (Task.RETRIEVAL,)
    assert set(described.spec.processors) == {modality.value}
    processors = described.freeze(tmp_path / "out")
    spec = described.spec.roles[role]()
    check_reference(described.source, role, spec, processors, described.spec.references[role])


def test_a_tower_alone_embeds_as_in_the_whole_model(write: Any, clip_folder: Path) -> None:
    whole, (folder, _) = describe(clip_folder), write("CLIPVisionModelWithProjection")
    alone = describe(folder).spec.roles["image_encoder"]()
    both = whole.spec.roles["image_encoder"]()
    pixels = both.sample({"batch": 2}, 0)["pixel_values"]
    assert alone.module is not None
    assert both.module is not None
    with torch.inference_mode():
        torch.testing.assert_close(alone.module(pixels), both.module(pixels))


def test_a_siglip_without_its_pooling_head_is_refused(write: Any) -> None:
    folder, model = write("SiglipVisionModel")
    config = model.config
    config.vision_use_head = False
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    with pytest.raises(SourceError, match=r"config\.json, vision_use_head: got False"):
        describe(folder)


def test_an_image_only_bundle_encodes_images_alone(write: Any, tmp_path: Path) -> None:
    folder, model = write("CLIPVisionModelWithProjection")
    convert(ConvertConfig(str(folder), tmp_path / "image.mmedge"))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    with torch.inference_mode():
        expected = model(**processor(image, return_tensors="pt")).image_embeds
    with mmedge.load(tmp_path / "image.mmedge") as encoder:
        got = encoder.encode_image(image)
        with pytest.raises(InputError, match="text_encoder"):
            encoder.encode_text("a circle")
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(got), expected)
    assert float(cosine) > 0.9999


def test_a_masked_text_only_bundle_gives_the_reference_s_embeddings(
    write: Any,
    tmp_path: Path,
) -> None:
    folder, model = write("SiglipTextModel")
    convert(ConvertConfig(str(folder), tmp_path / "text.mmedge"))
    texts = ["a red circle", "a", "a blue star left of a small green square and a circle"]
    tokenizer = transformers.SiglipTokenizer.from_pretrained(folder)
    given = tokenizer(
        texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    assert given["attention_mask"].min() == 0
    with torch.inference_mode():
        expected = model(**given).pooler_output
    with mmedge.load(tmp_path / "text.mmedge") as encoder:
        got = encoder.encode_text(texts)
        with pytest.raises(InputError, match="image_encoder"):
            encoder.encode_image(np.zeros((8, 8, 3), np.uint8))
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(got), expected)
    assert float(cosine.min()) > 0.9999
