"""What the role of an RT-DETR is, and what is refused of its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from describing import describe
from models.detections import same_boxes
from models.tiny_models import write_rt_detr
from PIL import Image
from transformers import RTDetrImageProcessorPil, RTDetrV2ForObjectDetection

from mmedge import Detector
from mmedge.bundle import open_bundle
from mmedge.bundle.kinds import DetectorKind
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.families.reference import check_reference
from mmedge.converters.families.rt_detr import _summary
from mmedge.errors import ParityError, SourceError
from mmedge.sessions.verification import verify_bundle


@pytest.fixture(params=["rt_detr", "rt_detr_v2"])
def folder(request: pytest.FixtureRequest, rt_detr_folder: Path, tmp_path: Path) -> Path:
    """A tiny RT-DETR of either version."""
    first = request.param == "rt_detr"
    return rt_detr_folder if first else write_rt_detr(tmp_path / "second", second=True)


def test_the_role_is_the_models_own(folder: Path, tmp_path: Path) -> None:
    described = describe(folder)
    kind = described.spec.kind
    assert isinstance(kind, DetectorKind)
    assert len(kind.labels) == 5
    spec = described.spec.roles["image_encoder"]()
    assert spec.verified == {"summary"}
    assert spec.module is not None
    reference = described.spec.references["image_encoder"]
    processors = described.freeze(tmp_path / "out")
    check_reference(described.source, "image_encoder", spec, processors, reference)
    pixels = spec.sample({"batch": 3}, 1)["pixel_values"]
    with torch.inference_mode():
        _, logits, boxes = spec.module(pixels)
        expected = described.model(pixels)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    with torch.no_grad():
        described.model.model.decoder.class_embed[-1].bias.mul_(-1)
    other = describe(folder).spec.roles["image_encoder"]()
    with pytest.raises(ParityError, match="image_encoder: differs from the source's own model"):
        check_reference(described.source, "image_encoder", other, processors, reference)


@pytest.mark.slow
def test_the_second_version_detects_as_with_transformers(tmp_path: Path) -> None:
    folder = write_rt_detr(tmp_path / "source", second=True)
    bundle = tmp_path / "second.mmedge"
    convert(ConvertConfig(str(folder), bundle, precisions=("fp32", "int8-dynamic")))
    assert all(result.passed for result in verify_bundle(open_bundle(bundle)))
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((100, 80), Image.Resampling.BICUBIC))
    processor = RTDetrImageProcessorPil.from_pretrained(folder)
    model = RTDetrV2ForObjectDetection.from_pretrained(folder).eval()
    with torch.inference_mode():
        outputs = model(**processor(Image.fromarray(image), return_tensors="pt"))
    scores = outputs.logits.sigmoid().flatten().sort(descending=True).values
    threshold = float((scores[9] + scores[10]) / 2)
    (wanted,) = processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=[(80, 100)]
    )
    with Detector.load(bundle, precision="fp32") as detector:
        found = detector.detect(image, threshold=threshold)
    boxes = wanted["boxes"].numpy().clip(0, [100, 80, 100, 80])
    same_boxes(found, (boxes, wanted["scores"].numpy(), wanted["labels"].numpy()))
    assert len(found) == 10


def test_the_summary_is_of_queries_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 3, generator=generator)
    boxes = torch.rand(2, 7, 4, generator=generator)
    order = torch.randperm(7, generator=generator)
    summary = _summary(logits, boxes)
    torch.testing.assert_close(_summary(logits[:, order], boxes[:, order]), summary)
    assert summary.shape == (2, 3, 5)
    assert (_summary(logits, boxes + 0.1) - summary).abs().max() > 0.05
    assert (_summary(logits, boxes[:, order]) - summary).abs().max() > 0.01


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "id2label has the ids|is .5, 16."),
        ("config.json", {"learn_initial_query": True}, "learn_initial_query.*cannot run it"),
        ("preprocessor_config.json", {"size": {"longest_edge": 64}}, "size"),
        ("preprocessor_config.json", {"do_pad": True}, "mmedge pads images for OWLv2 alone"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    file: str, changes: dict[str, object], reason: str, rt_detr_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(rt_detr_folder, tmp_path / "copy")
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**values, **changes}), encoding="utf-8")
    with pytest.raises(SourceError, match=reason):
        describe(folder)
