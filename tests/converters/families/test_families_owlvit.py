"""What is refused of an OWL's files, and what the roles are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from describing import describe
from models.tiny_models import OWL_SIDE
from transformers import AutoTokenizer

from mmedge.bundle.kinds import DetectorKind
from mmedge.converters.families.reference import check_reference
from mmedge.errors import ParityError, SourceError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.steps import Pad, Resize


def changed(folder: Path, tmp_path: Path, file: str, **changes: object) -> Path:
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / file).read_text(encoding="utf-8"))
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (copy / file).write_text(json.dumps(values), encoding="utf-8")
    return copy


@pytest.mark.parametrize("name", ["owlvit", "owlv2"])
def test_roles_are_the_models_own(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    described = describe(request.getfixturevalue(f"{name}_folder"))
    kind = described.spec.kind
    assert isinstance(kind, DetectorKind)
    assert tuple(described.spec.roles) == kind.role_names() == ("text_encoder", "image_encoder")
    config = described.spec.processors["image"]
    assert isinstance(config, ImageConfig)
    assert (config.find(Pad) is not None) == (name == "owlv2")
    image = described.spec.roles["image_encoder"]()
    assert [item.name for item in image.outputs][4:] == ["objectness"] * (name == "owlv2")
    processors = described.freeze(tmp_path / "out")
    for role, reference in described.spec.references.items():
        spec = described.spec.roles[role]()
        check_reference(described.source, role, spec, processors, reference)
    with torch.no_grad():
        described.model.layer_norm.bias.add_(0.5)
    reference = described.spec.references["image_encoder"]
    other = describe(described.source.folder).spec.roles["image_encoder"]()
    with pytest.raises(ParityError, match="image_encoder: differs from the source's own model"):
        check_reference(described.source, "image_encoder", other, processors, reference)


def test_sides_may_be_a_list_as_in_old_files(owlvit_folder: Path, tmp_path: Path) -> None:
    folder = changed(owlvit_folder, tmp_path, "preprocessor_config.json", size=[OWL_SIDE] * 2)
    config = describe(folder).spec.processors["image"]
    assert isinstance(config, ImageConfig)
    resize = config.find(Resize)
    assert resize is not None
    assert (resize.height, resize.width) == (OWL_SIDE, OWL_SIDE)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("preprocessor_config.json", {"do_pad": True}, "mmedge pads images for OWLv2 alone"),
        ("preprocessor_config.json", {"size": [16, 16]}, "gives images of 16x16"),
        ("preprocessor_config.json", {"size": [40]}, "two of them, or an object of sides"),
        ("config.json", {"text_config": {"vocab_size": 100}}, "table has 100 rows|is .514, 32."),
        ("config.json", {"vision_config": {"image_size": 48}}, "40x40.*48x48|is .26, 32."),
    ],
)
def test_files_that_do_not_fit_are_refused(
    file: str, changes: dict[str, object], reason: str, owlvit_folder: Path, tmp_path: Path
) -> None:
    folder = changed(owlvit_folder, tmp_path, file, **changes)
    with pytest.raises(SourceError, match=reason):
        describe(folder)


def test_a_token_above_the_one_that_closes_a_text_is_refused(
    owlvit_folder: Path, tmp_path: Path
) -> None:
    folder = changed(owlvit_folder, tmp_path, "config.json", text_config={"vocab_size": 600})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"pools at the highest token id, 514.* with id 513"):
        describe(folder)
