"""Ranges chosen from a histogram: what each method cuts off, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.converters.methods.configs import RangeMethod
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.statistics.ranges import (
    BINS,
    Histogram,
    choose_range,
    span_of,
    squared_error,
)
from mmedge.specs import Array

METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy", "mse")


def chosen(values: Array, method: RangeMethod, *, symmetric: bool = False) -> Range:
    extreme = Range(float(values.min()), float(values.max()))
    return choose_range(counted(values, symmetric=symmetric), extreme, method, symmetric=symmetric)


def counted(values: Array, *, symmetric: bool = False) -> Histogram:
    span = span_of(Range(float(values.min()), float(values.max())), symmetric=symmetric)
    return Histogram(np.histogram(values, BINS, span)[0], *span)


def error(values: Array, kept: Range, *, symmetric: bool = False) -> float:
    """Mean squared error of quantizing the values themselves, as the operators do it."""
    if symmetric:
        scale = np.float32(max(abs(kept.low), abs(kept.high)) / 127)
        quantized = np.clip(np.rint(values / scale), -128, 127)
    else:
        scale_number, zero_point = kept.affine()
        scale = np.float32(scale_number)
        quantized = np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point
    return float(np.mean((quantized * scale - values) ** 2))


def gaussian(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(200_000)


DISTRIBUTIONS = {
    "gaussian": gaussian(),
    "outlier": np.append(gaussian(), 40.0),
    "two outliers": np.append(gaussian(), [300.0, -500.0]),
    "laplace": np.random.default_rng(1).laplace(size=200_000),
    "heavy tails": np.random.default_rng(2).standard_t(3, 200_000),
    "uniform": np.random.default_rng(3).uniform(-1, 1, 200_000),
    "relu": np.maximum(gaussian(), 0),
    "gelu": gaussian() / (1 + np.exp(-1.702 * gaussian())),
    "above zero": np.random.default_rng(4).uniform(3, 4, 50_000),
    "below zero": -np.random.default_rng(5).exponential(size=100_000) - 1,
    "few": gaussian()[:10],
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_the_least_error_of_all_methods(name: str, symmetric: bool) -> None:
    values = DISTRIBUTIONS[name]
    errors = {
        method: error(values, chosen(values, method, symmetric=symmetric), symmetric=symmetric)
        for method in METHODS
    }
    # The histogram knows a value only by its bin.
    assert errors["mse"] <= min(errors.values()) * 1.01


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "heavy tails", "two outliers", "gelu"])
def test_mse_is_the_least_error_that_a_fine_grid_of_ranges_finds(
    name: str, symmetric: bool
) -> None:
    values = DISTRIBUTIONS[name]
    histogram = counted(values, symmetric=symmetric)
    low, high = float(values.min()), float(values.max())
    factors = np.geomspace(1, 1 / 200, 70).tolist()
    if symmetric:
        reach = max(abs(low), abs(high))
        grid = [Range(-reach * factor, reach * factor) for factor in factors]
    else:
        grid = [Range(low * a, high * b) for a in factors for b in factors]
    best = min(squared_error(histogram, kept, symmetric=symmetric) for kept in grid)
    got = chosen(values, "mse", symmetric=symmetric)
    assert squared_error(histogram, got, symmetric=symmetric) <= best * 1.02


def test_mse_holds_on_values_that_it_has_not_seen() -> None:
    seen, held_out = (np.append(gaussian(seed), [9.0, -9.0]) for seed in (1, 2))
    errors = {method: error(held_out, chosen(seen, method)) for method in METHODS}
    assert min(errors, key=errors.__getitem__) == "mse"
    assert errors["mse"] < 0.7 * errors["minmax"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_error_of_a_histogram_is_that_of_its_values(name: str, symmetric: bool) -> None:
    values = DISTRIBUTIONS[name]
    histogram = counted(values, symmetric=symmetric)
    for factor in (1.0, 0.6, 0.1):
        kept = Range(float(values.min()) * factor, float(values.max()) * factor)
        exact = error(values, kept, symmetric=symmetric)
        got = squared_error(histogram, kept, symmetric=symmetric)
        # Ten values are not spread evenly over their ten bins.
        assert got == pytest.approx(exact, rel=0.1 if name == "few" else 0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("method", "highest", "share"),
    # The squared error counts the outlier too: it is cut short, not cut off.
    [("percentile", 5, 0.05), ("entropy", 6, 0.05), ("mse", 35, 0.7)],
)
def test_one_outlier_gives_way_to_the_rest(
    method: RangeMethod, highest: float, share: float, symmetric: bool
) -> None:
    values = DISTRIBUTIONS["outlier"]
    got, whole = (chosen(values, name, symmetric=symmetric) for name in (method, "minmax"))
    assert 3 < got.high < highest
    rest = values[:-1]
    assert error(rest, got, symmetric=symmetric) < share * error(rest, whole, symmetric=symmetric)
    assert whole.high == 40


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_outliers_far_out_do_not_blur_where_to_cut(method: RangeMethod) -> None:
    got = chosen(DISTRIBUTIONS["two outliers"], method, symmetric=True)
    assert 3 < max(-got.low, got.high) < 8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_uniform_distribution_is_kept_whole(method: RangeMethod, symmetric: bool) -> None:
    got = chosen(DISTRIBUTIONS["uniform"], method, symmetric=symmetric)
    assert got.low == pytest.approx(-1, abs=0.01)
    assert got.high == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_range_never_leaves_the_extremes(name: str, method: RangeMethod, symmetric: bool) -> None:
    values = DISTRIBUTIONS[name]
    got = chosen(values, method, symmetric=symmetric)
    assert values.min() <= got.low <= got.high <= values.max()


def test_each_side_is_cut_by_itself() -> None:
    """An outlier below zero costs nothing above it."""
    values = np.append(gaussian(), -40.0)
    got = chosen(values, "mse")
    assert -35 < got.low < -3
    assert 3 < got.high < 5
    assert error(values, got) < error(values, chosen(values, "mse", symmetric=True), symmetric=True)


def test_a_symmetric_range_of_one_sided_values_counts_that_side() -> None:
    values = DISTRIBUTIONS["relu"]
    for method in METHODS:
        got = chosen(values, method, symmetric=True)
        assert got.low == 0
        assert got.high > 3


def test_the_zeros_of_a_relu_do_not_decide_the_entropy() -> None:
    values = DISTRIBUTIONS["relu"]
    without = values[values > 0]
    got, alone = (chosen(array, "entropy").high for array in (values, without))
    assert got == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_two_values_are_both_stored(method: RangeMethod) -> None:
    got = chosen(np.array([-2.0, 3.0]), method)
    assert got.low == pytest.approx(-2, abs=0.05)
    assert got.high == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_ranges_agree_with_those_of_onnxruntime(method: RangeMethod) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = DISTRIBUTIONS["laplace"].astype(np.float32)
    peer = HistogramCollector(
        method, symmetric=False, num_bins=2048, num_quantized_bins=128, percentile=99.99,
        scenario="same",
    )  # fmt: skip
    peer.collect({"x": values})
    low, high = peer.compute_collection_result()["x"][:2]
    got = chosen(values, method, symmetric=method == "entropy")
    # Entropy there: both sides cut alike, 2048 bins of both sides for 128 levels.
    reach = max(-got.low, got.high)
    assert max(-low, high) == pytest.approx(reach, rel=0.25 if method == "entropy" else 0.02)
