"""What is chosen for all roles together, and what of a search goes into a bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trials_of import PARITY, built, fp32_trial, trial

from mmedge.converters.evaluation.dataset import EvaluationSet
from mmedge.converters.evaluation.embedding import Labels
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.tuning.joint import choose_together, default_metric, placed, require_told
from mmedge.converters.tuning.pareto import Budget, Trial
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import BuiltRole
from mmedge.errors import CalibrationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Modality

COUNT = 20
CAPTIONS = tuple(f"caption {index}" for index in range(COUNT))


def samples(known: Labels) -> EvaluationSet:
    images = [np.zeros((2, 2, 3), np.uint8)] * COUNT
    classes = [f"a {name}" for name in known.classes]
    return EvaluationSet(images, CAPTIONS, known, classes, "held-out: 20", "held-out: 20")


def variant(name: str, swapped: int | None = None) -> BuiltVariant:
    """Embeddings of which two samples have changed places, or none."""
    rows = np.eye(COUNT, dtype=np.float32)
    if swapped is not None:
        rows[[swapped, swapped + 1]] = rows[[swapped + 1, swapped]]
    recipe = parse_recipe(name)
    return BuiltVariant(recipe, {}, None, 20, PARITY, rows[:4], rows, 0.0)


def of(one: Trial, made: BuiltVariant) -> Trial:
    return replace(one, built=made)


@pytest.fixture
def roles() -> dict[str, BuiltRole]:
    golden = np.zeros((4, 3), np.float32)
    return {
        name: BuiltRole(modality, (), (), golden, (variant("fp32"),))
        for name, modality in (
            ("image_encoder", Modality.IMAGE),
            ("text_encoder", Modality.TEXT),
        )
    }


@pytest.fixture
def tried() -> dict[str, list[Trial]]:
    """Each role loses a tenth of recall@1 by int8, and not of the same samples."""
    fp32 = of(fp32_trial(), variant("fp32"))
    image = of(trial("int8-dynamic", 0.1, 0.3), variant("int8-dynamic", 0))
    text = of(trial("int8-dynamic", 0.1, 0.5), variant("int8-dynamic", 5))
    return {"image_encoder": [fp32, image], "text_encoder": [fp32, text]}


def chosen(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole], budget: Budget
) -> tuple[dict[str, str], float | None]:
    known = Labels(captions=CAPTIONS)
    picks, joint = choose_together(tried, roles, samples(known), budget)
    return {name: one.name for name, one in picks.items()}, joint and joint.value


def test_each_role_has_its_best_where_both_hold(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole]
) -> None:
    picks, joint = chosen(tried, roles, Budget("recall@1", 0.2, "latency"))
    assert set(picks.values()) == {"int8-dynamic"}
    assert joint == pytest.approx(0.2)


def test_where_losses_add_up_the_cheapest_that_holds_is_taken(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole]
) -> None:
    picks, joint = chosen(tried, roles, Budget("recall@1", 0.15, "latency"))
    assert picks == {"image_encoder": "int8-dynamic", "text_encoder": "fp32"}
    assert joint == pytest.approx(0.1)


def test_agreement_with_fp32_is_of_one_role_alone(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole]
) -> None:
    picks, joint = chosen(tried, roles, Budget("cosine-mean", 0.15, "latency"))
    assert set(picks.values()) == {"int8-dynamic"}
    assert joint is None


def test_what_the_data_cannot_tell_is_said() -> None:
    captions = samples(Labels(captions=CAPTIONS))
    one_class = samples(Labels(labels=("red",) * COUNT, classes=("red",)))
    two = samples(Labels(labels=("red", "blue") * 10, classes=("blue", "red")))
    nothing = samples(Labels())
    for metric in ("recall@1", "recall@10", "cosine-p1", "top-k"):
        require_told(metric, captions)
    require_told("zero-shot", two)
    require_told("interchangeability", nothing)
    for metric, data in (
        ("zero-shot", captions),
        ("zero-shot", one_class),
        ("recall@1", two),
        ("recall@5", nothing),
        ("recall@10", replace(captions, images=captions.images[:10])),
    ):
        with pytest.raises(CalibrationError, match=f"'{metric}' cannot be told.*--evaluate"):
            require_told(metric, data)


@pytest.mark.parametrize(
    ("known", "metric"),
    [
        (Labels(captions=CAPTIONS, classes=("a", "b")), "recall@1"),
        (Labels(labels=("a", "b"), classes=("a", "b")), "zero-shot"),
        (Labels(labels=("a", "a"), classes=("a",)), "cosine-p1"),
        (Labels(), "cosine-p1"),
    ],
)
def test_the_default_metric_can_be_told(known: Labels, metric: str) -> None:
    assert default_metric(known) == metric
    require_told(default_metric(known), samples(known))


@pytest.mark.parametrize("links", [True, False])
def test_what_is_placed_in_the_bundle_stays_in_the_work_folder(
    links: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    old, bundle = tmp_path / "work" / "image_encoder", tmp_path / "bundle"
    bundle.mkdir()
    before = built("int8-static", old)
    after = placed(before, bundle)
    assert after.nodes == bundle / "image_encoder" / "int8-static.nodes.json"
    for name in (path.name for path in old.iterdir()):
        assert (bundle / "image_encoder" / name).read_bytes() == (old / name).read_bytes()
    for model in (*before.models.values(), *after.models.values()):
        with open_session(model) as session:
            assert session.inputs[0].name == "pixel_values"
