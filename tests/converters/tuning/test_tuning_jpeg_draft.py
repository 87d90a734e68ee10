"""The JPEG draft: chosen where embeddings stay what they are, and left out where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.bundle.kinds import EncoderKind
from mmedge.bundle.quality import Parity
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.config import ConvertConfig, JpegDraft
from mmedge.converters.data.checks import Data
from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.embedding import Retrieval
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.methods.recipes import FP32
from mmedge.converters.tuning.jpeg_draft import choose_jpeg_draft
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import BuiltRole
from mmedge.converters.variants.job import Job
from mmedge.errors import ConversionError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.registry import open_processor
from mmedge.preprocess.steps import Decode
from mmedge.specs import Array, Compare, Modality, TensorSpec

SIDE = bundles.IMAGE_SIZE * 4  # the draft is half of it: twice what the model sees
ROLE = RoleSpec(
    module=None,
    inputs=(TensorSpec("pixel_values", np.dtype("float32"), ("batch", 3, 8, 8)),),
    outputs=(TensorSpec("embedding", np.dtype("float32"), ("batch", bundles.DIM)),),
    axes={},
    sample=lambda *_: {},
    trace_sizes={},
    proof_sizes=(),
    feeds={"pixel_values": ProcessorFeed(processor="image")},
    compare={"embedding": Compare.ROWS},
)


def scenes(count: int) -> list[Array]:
    """Images of two colours each."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        image = np.empty((SIDE, SIDE + 8, 3))
        image[:], image[:, SIDE // 2 :] = rng.uniform(0, 255, (2, 3))
        images.append(image)
    return images


def job(
    bundle: Bundle, folder: Path, images: Sequence[Array], draft: JpegDraft, suffix: str = "jpg"
) -> tuple[Job, dict[str, BuiltRole]]:
    """A conversion whose fp32 graph is built and evaluated on the images as files."""
    paths = [folder / f"{index:03}.{suffix}" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
    kind = EncoderKind(encoders={Modality.IMAGE: "image_encoder"}, embedding_dim=bundles.DIM)
    image_config = bundles.PROCESSORS["image"]
    processors = {"image": open_processor(image_config, folder)}
    model = ModelSpec(kind, (), {}, processors={"image": image_config})
    data = Dataset("held-out", tuple(Sample(image=path) for path in paths))
    evaluation = Retrieval(Subject(model, processors, folder, data, "{}", 0))
    variant = BuiltVariant(
        recipe=FP32,
        models={"portable": bundle.path / bundles.MODEL},
        nodes=None,
        opset=20,
        parity=Parity(cosine_min=1.0, cosine_mean=1.0, max_abs_error=0.0, samples=1),
        golden={},
        collected={"embedding": bundles.encode_image(processors["image"](paths)["pixel_values"])},
        duration_s=0.0,
    )
    made = Job(
        config=ConvertConfig("m", folder / "m.mmedge", jpeg_draft=draft),
        folder=folder,
        model=model,
        processors=processors,
        data=Data(None, data, (), ()),
        evaluation=evaluation,
        progress=lambda _: None,
        space="space",
        weights_sha256="0",
    )
    return made, {"image_encoder": BuiltRole(ROLE, {}, (variant,))}


def drafted(made: Job) -> bool:
    config = made.model.processors["image"]
    assert isinstance(config, ImageConfig)
    return (config.find(Decode) or Decode()).jpeg_draft


def test_the_draft_is_chosen_where_embeddings_stay_the_same(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    given, roles = job(tiny_bundle, tmp_path, scenes(24), "auto")
    made, notes = choose_jpeg_draft(given, roles)
    assert drafted(made)
    assert made.jpeg_draft is not None
    cosine = made.jpeg_draft.value("cosine_mean")
    assert cosine is not None
    assert 0.999 < cosine < 1
    assert notes[0].startswith("JPEG draft: on (image_encoder cosine-p1 loss 0.00")
    assert notes[0].endswith("24 files decoded smaller).")
    assert not drafted(given)
    assert given.evaluation.subject.processors == given.processors


def test_the_draft_is_left_out_over_the_accuracy_budget(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    given, roles = job(tiny_bundle, tmp_path, scenes(24), "auto")
    strict = replace(given.config, precisions=("auto",), max_drop=0.0, metric="cosine-p1")
    given = replace(given, config=strict)
    made, notes = choose_jpeg_draft(given, roles)
    assert made is given
    assert notes[0].startswith("JPEG draft: off, over the accuracy budget (image_encoder cosine-p1")


@pytest.mark.parametrize(("suffix", "count", "reduced"), [("png", 20, 0), ("jpg", 15, 15)])
def test_the_draft_is_left_out_without_files_to_measure_it_on(
    suffix: str, count: int, reduced: int, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    given, roles = job(tiny_bundle, tmp_path, scenes(count), "auto", suffix)
    made, notes = choose_jpeg_draft(given, roles)
    assert made is given
    assert f"JPEG draft: off. {reduced} images" in notes[0]
    assert "32 pixels or more), expected 16" in notes[0]


def test_the_draft_is_off_unless_asked_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    given, roles = job(tiny_bundle, tmp_path, scenes(2), "off")
    assert choose_jpeg_draft(given, roles) == (given, ())
    with pytest.raises(ConversionError, match="--jpeg-draft: got 'on', expected off or auto"):
        replace(given.config, jpeg_draft="on")  # type: ignore[arg-type]
