"""What is chosen for all roles together, and what of a search goes into a bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import retrieval
from trials_of import PARITY, built, fp32_trial, trial

from mmedge.converters.evaluation.embedding import Retrieval
from mmedge.converters.families.towers import embedding_role
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.tuning.joint import choose_together, placed
from mmedge.converters.tuning.pareto import Budget, Trial
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import BuiltRole
from mmedge.runtimes.backends import open_session

COUNT = 20
CAPTIONS = tuple(f"caption {index}" for index in range(COUNT))


def variant(name: str, swapped: int | None = None) -> BuiltVariant:
    """Embeddings of which two samples have changed places, or none."""
    rows = np.eye(COUNT, dtype=np.float32)
    if swapped is not None:
        rows[[swapped, swapped + 1]] = rows[[swapped + 1, swapped]]
    recipe = parse_recipe(name)
    return BuiltVariant(
        recipe, {}, None, 20, PARITY, {"embedding": rows[:4]}, {"embedding": rows}, 0.0
    )


def of(one: Trial, made: BuiltVariant) -> Trial:
    return replace(one, built=made)


@pytest.fixture
def roles() -> dict[str, BuiltRole]:
    spec = embedding_role(
        torch.nn.Identity(),
        (),
        COUNT,
        processor="image",
        axes={},
        sample=lambda *_: {},
    )
    return {
        name: BuiltRole(spec, {}, (variant("fp32"),)) for name in ("image_encoder", "text_encoder")
    }


@pytest.fixture
def tried() -> dict[str, list[Trial]]:
    """Each role loses a tenth of recall@1 by int8, and not of the same samples."""
    fp32 = of(fp32_trial(), variant("fp32"))
    image = of(trial("int8-dynamic", 0.1, 0.3), variant("int8-dynamic", 0))
    text = of(trial("int8-dynamic", 0.1, 0.5), variant("int8-dynamic", 5))
    return {"image_encoder": [fp32, image], "text_encoder": [fp32, text]}


@pytest.fixture
def evaluation(tmp_path: Path) -> Retrieval:
    return retrieval(tmp_path, COUNT, CAPTIONS)


def chosen(
    tried: dict[str, list[Trial]],
    roles: dict[str, BuiltRole],
    evaluation: Retrieval,
    budget: Budget,
) -> tuple[dict[str, str], float | None]:
    picks, joint = choose_together(tried, roles, evaluation, budget)
    return {name: one.name for name, one in picks.items()}, joint and joint.value


def test_each_role_has_its_best_where_both_hold(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole], evaluation: Retrieval
) -> None:
    picks, joint = chosen(tried, roles, evaluation, Budget("recall@1", 0.2, "latency"))
    assert set(picks.values()) == {"int8-dynamic"}
    assert joint == pytest.approx(0.2)


def test_where_losses_add_up_the_cheapest_that_holds_is_taken(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole], evaluation: Retrieval
) -> None:
    picks, joint = chosen(tried, roles, evaluation, Budget("recall@1", 0.15, "latency"))
    assert picks == {"image_encoder": "int8-dynamic", "text_encoder": "fp32"}
    assert joint == pytest.approx(0.1)


def test_agreement_with_fp32_is_of_one_role_alone(
    tried: dict[str, list[Trial]], roles: dict[str, BuiltRole], evaluation: Retrieval
) -> None:
    picks, joint = chosen(tried, roles, evaluation, Budget("cosine-mean", 0.15, "latency"))
    assert set(picks.values()) == {"int8-dynamic"}
    assert joint is None


@pytest.mark.parametrize("links", [True, False])
def test_files_of_the_bundle_stay_in_the_work_folder(
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
