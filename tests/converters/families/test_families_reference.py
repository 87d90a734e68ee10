"""Inputs that the source's own model gets are fed, or shown to be without effect."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from describing import Described, describe

from mmedge.converters.families.reference import check_reference
from mmedge.errors import ParityError, SourceError


def check(described: Described, out: Path, role: str, **changes: Any) -> None:
    """Compare a changed role with its reference."""
    spec = replace(described.spec.roles[role](), **changes)
    reference = described.spec.references[role]
    check_reference(described.source, role, spec, described.freeze(out), reference)


@pytest.mark.parametrize("family", ["clip", "siglip", "clap"])
def test_every_role_equals_the_reference(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    described = describe(request.getfixturevalue(f"{family}_folder"))
    assert described.spec.references.keys() == described.spec.roles.keys()
    for role in described.spec.roles:
        check(described, tmp_path / "out", role)


def test_a_mask_that_the_tokenizer_gives_is_fed(siglip_folder: Path, tmp_path: Path) -> None:
    described = describe(siglip_folder)
    spec = described.spec.roles["text_encoder"]()
    assert [item.name for item in spec.inputs] == ["input_ids", "attention_mask"]
    with pytest.raises(ParityError, match="does not take attention_mask, which"):
        check(described, tmp_path / "out", "text_encoder", inputs=spec.inputs[:1])


def test_a_mask_that_the_tokenizer_does_not_give_is_not_fed(
    siglip_folder: Path, tmp_path: Path
) -> None:
    """As in google/siglip-base-patch16-224, whose padding is part of the text."""
    folder = shutil.copytree(siglip_folder, tmp_path / "model")
    settings = {"model_input_names": ["input_ids"], "tokenizer_class": "SiglipTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    described = describe(folder)
    spec = described.spec.roles["text_encoder"]()
    assert [item.name for item in spec.inputs] == ["input_ids"]
    check(described, tmp_path / "out", "text_encoder")


def test_another_model_differs(clip_folder: Path, tmp_path: Path) -> None:
    described = describe(clip_folder)

    class Other(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(input_ids[:, :1] % 16, 16).float().flatten(1)

    with pytest.raises(ParityError, match=r"smallest cosine .* attention_mask"):
        check(described, tmp_path / "out", "text_encoder", module=Other())
    narrow = torch.nn.Sequential(torch.nn.Embedding(600, 8), Mean())
    with pytest.raises(ParityError, match=r"gives \(6, 8\), the source's own model \(6, 16\)"):
        check(described, tmp_path / "out", "text_encoder", module=narrow)


class Mean(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.mean(1)


def test_a_model_that_refuses_its_processor_s_inputs_is_a_source_error(
    clip_folder: Path, tmp_path: Path
) -> None:
    described = describe(clip_folder)

    def refuse(input_ids: torch.Tensor) -> torch.Tensor:
        raise IndexError("index out of range in self")

    spec = described.spec.roles["text_encoder"]()
    processors = described.freeze(tmp_path / "out")
    with pytest.raises(SourceError, match="index out of range"):
        check_reference(described.source, "text_encoder", spec, processors, refuse)
