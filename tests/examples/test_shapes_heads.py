"""The heads of the shapes world, from their bundles in the repository, on unseen scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_heads import HEADS, attribute, calibration, night, relations, shuffled
from head_tasks import (
    attribute_examples,
    looked_at,
    night_examples,
    relation_examples,
    silhouettes,
)
from world import relation

import mmedge
from mmedge.converters import ConvertConfig, convert
from mmedge.models import DualEncoder

COUNT, SEED = 120, 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DualEncoder]:
    out = tmp_path_factory.mktemp("shapes") / "clip.mmedge"
    convert(ConvertConfig(str(HEADS.parent / "clip"), out, taps=("patches", "tokens")))
    with mmedge.load(out) as model:
        assert isinstance(model, DualEncoder)
        yield model


def test_relations_need_the_image_and_the_text(clip: DualEncoder) -> None:
    made: Any = relations(clip, HEADS, COUNT, SEED)
    assert made["accuracy"] > 0.93
    assert made["pointing"] > 0.93
    assert max(made["patches_shuffled"], made["words_shuffled"]) < 0.7


def test_attributes_need_patches(clip: DualEncoder) -> None:
    made: Any = attribute(clip, HEADS, COUNT, SEED)
    patches, pooled = made["patches"], made["embedding"]
    assert patches["accuracy"] > 0.9
    assert patches["accuracy"] > pooled["accuracy"] + 0.15
    assert max(patches["image_shuffled"], patches["text_shuffled"]) < 0.75


def test_decisions_are_better_together(clip: DualEncoder) -> None:
    made: Any = night(clip, HEADS, COUNT, SEED)
    alone = max(made["camera_alone"]["accuracy"], made["sonar_alone"]["accuracy"])
    assert made["fitted"]["accuracy"] > max(alone, made["raw"]["accuracy"]) + 0.1
    assert made["fitted"]["nll"] < made["raw"]["nll"]
    assert made["fitted"]["ece"] < made["raw"]["ece"]
    assert made["useless_sonar"]["accuracy"] > made["camera_alone"]["accuracy"] - 0.05


def test_the_truth_of_the_tasks_is_exact() -> None:
    for each in relation_examples("test", 40, 1):
        first, second = each.named
        word = relation(first, second)
        assert (f" {word} " in each.text) == bool(each.answer)
    for each in attribute_examples("test", 40, 1):
        assert [t.colour for t in each.scene.things].count(each.named[0].colour) == 1
    examples = relation_examples("test", 40, 1)
    shares = looked_at(examples)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    best = shares.argmax(-1)[0]
    at = [(int(t.y * 8), int(t.x * 8)) for t in examples[0].named]
    found = [(int(b) // 8, int(b) % 8) for b in best]
    assert all(abs(a - b) <= 1 for one, two in zip(at, found, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip
    assert silhouettes(night_examples("test", 3, 0), 0).shape == (3, 256)


def test_calibration_of_sure_and_right() -> None:
    logs = np.log(np.array([[0.9, 0.1], [0.9, 0.1]], np.float32))
    made: Any = calibration(logs, np.array([0, 1]))
    assert made["ece"] == pytest.approx(0.4, abs=1e-5)
    assert made["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.1)) / 2, abs=1e-5)


def test_no_sample_keeps_its_place() -> None:
    order = shuffled(50)
    assert sorted(order) == list(range(50))
    assert not (order == np.arange(50)).any()


def test_heads_are_small() -> None:
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in Path(HEADS).iterdir()
    }
    assert sizes
    assert max(sizes.values()) < 2 << 20
