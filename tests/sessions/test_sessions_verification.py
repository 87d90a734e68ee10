"""verify_bundle: golden vectors replayed, and differences found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bundles import edit_manifest, golden_vectors

from mmedge.bundle import Bundle, Golden, open_bundle, save_golden
from mmedge.errors import BackendError, InputError
from mmedge.models import verify_bundle
from mmedge.sessions.verification import _compare
from mmedge.specs import Array


def test_every_role_and_variant_is_replayed(tiny_bundle: Bundle) -> None:
    results = verify_bundle(tiny_bundle)
    assert [(result.role, result.variant) for result in results] == [
        ("image_encoder", "fp32"),
        ("image_encoder", "int8-dynamic"),
        ("text_encoder", "fp32"),
        ("text_encoder", "int8-dynamic"),
    ]
    for result in results:
        assert result.passed
        assert result.samples == 2
        assert result.cosine_min > 0.999999
        assert result.max_abs_error < 1e-6
        assert result.placement.backend == "onnxruntime"
        assert result.tolerance == tiny_bundle.variant(result.role, result.variant).tolerance


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_one_precision(precision: str, tiny_bundle: Bundle) -> None:
    results = verify_bundle(tiny_bundle, precision=precision)
    assert [result.variant for result in results] == ["int8-dynamic", "int8-dynamic"]
    with pytest.raises(InputError, match=r"no variant 'int4'.*text_encoder: fp32, int8-d"):
        verify_bundle(tiny_bundle, precision="int4")


def test_other_outputs_do_not_pass(tiny_bundle: Bundle) -> None:
    results = verify_bundle(tiny_bundle, backend="fake")
    assert [result.passed for result in results] == [False] * 4
    assert all(result.cosine_min < 0.9 for result in results)


def test_one_sample_out_of_tolerance_is_enough(tiny_bundle: Bundle) -> None:
    golden = golden_vectors()
    outputs = {role: dict(variants) for role, variants in golden.outputs.items()}
    changed = np.array(outputs["image_encoder"]["fp32"]["embedding"])
    changed[1] = -changed[1]
    outputs["image_encoder"]["fp32"] = {"embedding": changed}
    save_golden(tiny_bundle.file("golden.npz"), Golden(golden.inputs, outputs))
    results = verify_bundle(tiny_bundle)
    assert [result.passed for result in results] == [False, True, True, True]
    assert results[0].cosine_min == pytest.approx(-1)
    assert results[0].max_abs_error == pytest.approx(2 * np.abs(changed[1]).max())


@pytest.mark.parametrize(
    ("factor", "tolerance", "passed"),
    [
        (1.5, {"cosine_min": 0.9, "max_abs_error": 1.0}, True),
        (1.5, {"cosine_min": 0.9, "max_abs_error": 0.01}, False),
        (-0.01, {"cosine_min": 0.9, "max_abs_error": 1.0}, False),
    ],
)
def test_both_figures_must_hold(
    factor: float, tolerance: dict[str, float], passed: bool, tiny_bundle: Bundle
) -> None:
    golden = golden_vectors()
    embedding = factor * golden.outputs["text_encoder"]["fp32"]["embedding"]
    outputs = {role: dict(variants) for role, variants in golden.outputs.items()}
    outputs["text_encoder"]["fp32"] = {"embedding": embedding.astype(np.float32)}
    save_golden(tiny_bundle.file("golden.npz"), Golden(golden.inputs, outputs))
    steps = ("roles", "text_encoder", "variants", 0, "tolerance")
    edit_manifest(tiny_bundle.path, *steps, value=tolerance)
    results = verify_bundle(open_bundle(tiny_bundle.path), precision="fp32")
    assert [result.passed for result in results] == [True, passed]


def test_unknown_backend_is_an_error(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="abacus"):
        verify_bundle(tiny_bundle, backend="abacus")


@pytest.mark.parametrize(
    ("output", "golden", "cosine", "error"),
    [
        ([[1, 0], [0, 2]], [[1, 0], [0, 1]], 1.0, 1.0),
        ([[0, 0]], [[0, 0]], 1.0, 0.0),
        ([[1, 1]], [[1, -1]], 0.0, 2.0),
        ([[np.nan, 1]], [[1, 1]], math.nan, math.nan),
        ([[1, 1], [np.inf, 1]], [[1, 1], [1, 1]], math.nan, math.inf),
        ([[0, 0]], [[1, 0]], math.nan, 1.0),
        ([[1, 0, 0]], [[1, 0]], math.nan, math.nan),
    ],
)
def test_comparison(output: Array, golden: Array, cosine: float, error: float) -> None:
    got = _compare({"y": np.array(output, np.float32)}, {"y": np.array(golden, np.float32)})
    np.testing.assert_allclose(got, (cosine, error), atol=1e-7)


def test_missing_output_is_nan() -> None:
    got = _compare({}, {"y": np.ones((1, 2), np.float32)})
    assert all(math.isnan(figure) for figure in got)
