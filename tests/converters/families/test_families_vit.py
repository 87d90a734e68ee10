"""Plain ViT: from transformers' files to a bundle that embeds and classifies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from describing import changed_config, describe
from families.image_models import check_agrees_with_transformers, check_is_judged_by_its_classes
from models.tiny_models import IMAGE_LABELS
from transformers import ViTForImageClassification, ViTModel

import mmedge
from mmedge import Encoder
from mmedge.errors import SourceError


@pytest.fixture(scope="module")
def encoder(vit_bundle: Path) -> Iterator[Encoder]:
    with Encoder.load(vit_bundle, precision="fp32") as model:
        yield model


def test_images_embed_and_classify_as_with_transformers(
    encoder: Encoder, vit_folder: Path, evaluation_folder: Path
) -> None:
    model = ViTForImageClassification.from_pretrained(vit_folder).eval()
    check_agrees_with_transformers(
        encoder, vit_folder, evaluation_folder, model,
        lambda outputs: outputs.last_hidden_state[:, 0],
    )  # fmt: skip


def test_variants_are_judged_by_their_classes(
    vit_bundle: Path, vit_folder: Path, evaluation_folder: Path
) -> None:
    model = ViTForImageClassification.from_pretrained(vit_folder).eval()
    check_is_judged_by_its_classes(vit_bundle, vit_folder, evaluation_folder, model)


@pytest.mark.parametrize("pooled", [True, False])
def test_an_encoder_alone_embeds_by_its_pooler_or_its_cls_token(
    pooled: bool, vit_folder: Path, tmp_path: Path
) -> None:
    config = ViTModel.config_class.from_pretrained(vit_folder)
    model = ViTModel(config, add_pooling_layer=pooled).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(vit_folder / "preprocessor_config.json", tmp_path)
    described = describe(tmp_path)
    assert described.spec.kind.class_head is None  # type: ignore[union-attr]
    spec = described.spec.roles["image_encoder"]()
    assert [output.name for output in spec.outputs] == ["embedding"]
    pixels = spec.sample({"batch": 2}, 1)["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixels)
        expected = outputs.pooler_output if pooled else outputs.last_hidden_state[:, 0]
        assert spec.module is not None
        got = spec.module(pixels)
    torch.testing.assert_close(got, torch.nn.functional.normalize(expected, dim=-1))


IDS = {str(index): name for index, name in enumerate(IMAGE_LABELS)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label: .*the 6 classes that classifier.weight"),
        ({"id2label": {**IDS, "5": ""}}, "id2label.5: got '', expected a string"),
        ({"id2label": {**IDS, "5": 5}}, "id2label.5: got 5, expected a string"),
        ({"id2label": {**IDS, "5": "x" * 10_001}}, "id2label.5: .*at most 10000 characters"),
        ({"id2label": {**IDS, "-1": "x"}}, "id2label: .*from '0' to '5'"),
        ({"id2label": list(IMAGE_LABELS)}, "id2label: .*expected an object"),
        ({"id2label": None}, "id2label: got None, expected a label for each of the 6 classes"),
        ({"problem_type": "regression"}, "problem_type: got 'regression', expected one of"),
        ({"image_size": 64}, "but the model takes 64x64"),
        ({"patch_size": 16}, "do not fit config.json: .*patch_embeddings"),
        ({"num_hidden_layers": 3}, "the checkpoint lacks"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, object], expected: str, vit_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"(?s){expected}"):
        describe(folder)


def test_a_classifier_without_its_head_is_refused(vit_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "copy")
    model = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False)
    model.save_pretrained(folder)
    config = json.loads((vit_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"architectures: .*the checkpoint has no classifier"):
        describe(folder)


def test_several_labels_an_image_are_scored_by_sigmoid(vit_folder: Path, tmp_path: Path) -> None:
    folder = changed_config(vit_folder, tmp_path, problem_type="multi_label_classification")
    head = describe(folder).spec.kind.class_head  # type: ignore[union-attr]
    assert head is not None
    assert (head.labels, head.activation) == (IMAGE_LABELS, "sigmoid")


def test_an_index_takes_images_of_an_encoder(
    vit_bundle: Path, evaluation_folder: Path, tmp_path: Path
) -> None:
    files = sorted(evaluation_folder.glob("*.png"))
    with mmedge.Index.create(tmp_path / "index", bundle=vit_bundle) as index:
        index.add(images=[str(path) for path in files[:6]], ids=[path.name for path in files[:6]])
        found = index.search(files[3], k=2)
    assert found[0].id == files[3].name
