"""What is measured of a generator, against torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mmedge.converters.evaluation.generation import Generation
from mmedge.converters.families.base import RoleSpec
from mmedge.errors import CalibrationError
from mmedge.specs import Array

WORDS = 11
SPEC = cast(RoleSpec, None)  # there is one role


class _Generation(Generation):
    """Without the processors and samples of a conversion."""

    def __init__(self, *, data: object) -> None:
        self.subject = cast(Any, SimpleNamespace(data=data))

    def about(self, spec: RoleSpec) -> str:  # noqa: ARG002
        return "texts"


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return [{"input_ids": rng.integers(0, WORDS, (2, 5)), "attention_mask": mask}]


def model(shift: float, scale: float = 1.0) -> Any:
    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        rng = np.random.default_rng(1)
        logits = rng.standard_normal((*feed["input_ids"].shape, WORDS)).astype(np.float32)
        logits[0, 0] += shift * np.arange(WORDS)
        return {"logits": scale * logits}

    return run


def test_likelihoods_are_those_of_torch() -> None:
    seen: list[None] = []
    made = _Generation(data="texts").collect(
        SPEC, model(0.0, 50.0), feeds(), lambda: seen.append(None), {}
    )
    feed = feeds()[0]
    logits = torch.from_numpy(model(0.0, 50.0)(feed)["logits"])
    expected = -torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), torch.from_numpy(feed["input_ids"][:, 1:]), reduction="none"
    )
    real = feed["attention_mask"][:, 1:] != 0
    np.testing.assert_allclose(made["log_likelihoods"], expected.numpy()[real], rtol=1e-5)
    assert made["tokens"].shape == (8,)  # padding does not count
    assert len(seen) == 1


def test_figures_count_positions_and_drops_are_lost_likelihood() -> None:
    evaluation = _Generation(data="texts")
    fp32, other = (
        evaluation.collect(SPEC, model(shift), feeds(), lambda: None, {}) for shift in (0.0, 9.0)
    )
    quality = evaluation.quality("decoder", SPEC, {"decoder": fp32}, other)
    assert quality.samples == 8
    assert quality.figures["token_agreement"].value == pytest.approx(7 / 8)
    lost = (fp32["log_likelihoods"] - other["log_likelihoods"]).mean()
    assert quality.drops["log_likelihood"].value == pytest.approx(lost, rel=1e-5)
    mean = other["log_likelihoods"].mean()
    assert quality.figures["log_likelihood"].value == pytest.approx(mean, rel=1e-5)


def test_synthetic_texts_have_no_likelihood() -> None:
    evaluation = _Generation(data=None)
    assert evaluation.available() == ("token-agreement",)
    made = evaluation.collect(SPEC, model(0.0), feeds(), lambda: None, {})
    quality = evaluation.quality("decoder", SPEC, {"decoder": made}, made)
    assert set(quality.figures) == {"token_agreement"}
    assert not quality.drops
    with pytest.raises(CalibrationError, match=r"synthetic samples: it needs texts that are not"):
        evaluation.check_metric("log-likelihood")
