"""A detector's section of the manifest, and what contradicts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.manifest import Manifest

Change = Callable[[dict[str, Any]], object]


def changed(bundle: Path, change: Change) -> Manifest:
    document = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change(document)
    return Manifest.model_validate(document)


def outputs(document: dict[str, Any], role: str = "image_encoder") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["roles"][role]["outputs"]
    return found


def test_facts_say_what_it_detects(owlvit_bundle: Path, rt_detr_bundle: Path) -> None:
    opened = [changed(bundle, lambda _: None).kind for bundle in (owlvit_bundle, rt_detr_bundle)]
    facts = [dict(kind.facts()) for kind in opened]
    assert facts[0] == {"detects": "what texts or images name", "threshold": "0.1"}
    assert facts[1]["detects"].startswith("5 classes: red circle, green square")
    assert all(isinstance(kind, DetectorKind) for kind in opened)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: outputs(d).pop(2), "has no output 'shift'"),
        (lambda d: outputs(d)[1].update(shape=["batch", 25, 5]), "expected 4 each"),
        (
            lambda d: outputs(d, "text_encoder")[0].update(shape=["batch", 16]),
            "queries of 16, class embeddings of 32",
        ),
        (lambda d: d["kind"].update(labels=["cat"]), "and 1 fixed labels"),
        (lambda d: d["kind"].update(threshold=1.5), "less than 1"),
        (lambda d: d["kind"].update(text_encoder=None), "role 'text_encoder' is not one"),
        (
            lambda d: d["kind"].update(text_encoder="image_encoder", image_encoder="text_encoder"),
            "text_encoder: has no output 'class_embeddings'",
        ),
    ],
)
def test_an_open_detector_that_contradicts_itself(
    change: Change, reason: str, owlvit_bundle: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        changed(owlvit_bundle, change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["kind"]["labels"].pop(), "4 labels for 5 logits"),
        (lambda d: outputs(d).pop(1), "has no output 'logits'"),
        (
            lambda d: d["roles"]["image_encoder"]["inputs"][0].update(feed={"caller": True}),
            "image_encoder: has no processor of images",
        ),
    ],
)
def test_a_closed_detector_that_contradicts_itself(
    change: Change, reason: str, rt_detr_bundle: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        changed(rt_detr_bundle, change)
