"""Sensitivity: the node that ruins the embedding is found, and left in float it is mended."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from crashes import crash_on
from towers import image_tower, images, text_tower, texts

from mmedge.converters.methods.configs import (
    DynamicInt8,
    Float8,
    Float16,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import (
    Int8Linears,
    quantizable_inputs,
    quantizable_linears,
    quantizable_tables,
)
from mmedge.converters.passes.matching import is_op
from mmedge.converters.quantization.sensitivity import (
    choose_excluded,
    measure_errors,
    measure_sensitivity,
    quantizable_nodes,
    weight_bytes,
)
from mmedge.converters.statistics.collect import collect_ranges
from mmedge.errors import BackendError, CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

SAMPLES = 6


def feeds() -> Iterator[dict[str, Array]]:
    for seed in range(4):
        yield images(2, seed=50 + seed)


def text_feeds() -> Iterator[dict[str, Array]]:
    for seed in range(4):
        yield texts(2, 9, seed=50 + seed)


def laid_out(portable: Path) -> Path:
    out = portable.with_name(f"{portable.stem}.ort.onnx")
    to_onnxruntime_layout(portable, out)
    return out


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return laid_out(image_tower(tmp_path / "image.onnx"))


@pytest.fixture
def outlier(tmp_path: Path) -> tuple[Path, str]:
    """A tower of the same function with one channel of one layer's input a thousand times larger.

    LayerNorm makes the channel large, and the weights of the one layer that reads it make it up.
    """
    portable = image_tower(tmp_path / "outlier.onnx")
    model = ir.load(portable)
    ir.external_data.load_to_model(model)
    readers: dict[str, list[str]] = {}
    linears = {linear.name: linear for linear in quantizable_linears(model.graph)}
    for linear in linears.values():
        readers.setdefault(linear.x.name or "", []).append(linear.name)
    (name, *_) = [
        alone
        for alone, *others in readers.values()
        if not others and is_op(linears[alone].x.producer(), "LayerNormalization")
    ]
    linear = linears[name]
    norm = linear.x.producer()
    assert norm is not None
    matrix = linear.matrix().copy()
    matrix[3] /= 1000
    replace(linear.weight, matrix)
    for value in norm.inputs[1:]:
        assert value is not None
        assert value.const_value is not None
        vector = value.const_value.numpy().copy()
        vector[3] *= 1000
        replace(value, vector)
    ir.save(model, portable, external_data=f"{portable.name}.data")
    return laid_out(portable), name


def replace(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(array, name=value.name)


def embed(model: Path, feed: Mapping[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def static_int8(model: Path, keep: tuple[str, ...]) -> Path:
    out = model.with_name("int8.onnx")
    graph = ir.load(model)
    ranges = collect_ranges(model, quantizable_inputs(graph), feeds)
    Int8Linears("operators", ranges, keep=keep)(graph)
    ir.save(graph, out)
    return out


@pytest.mark.parametrize("config", [StaticInt8(), StaticInt8(form="qdq"), DynamicInt8()], ids=str)
def test_the_layer_with_the_outlier_ranks_first(
    config: QuantizationConfig, outlier: tuple[Path, str]
) -> None:
    model, name = outlier
    errors = measure_sensitivity(model, config, feeds, samples=SAMPLES)
    assert tuple(errors) == quantizable_nodes(model, config)
    ranked = sorted(errors, key=lambda node: -errors[node])
    assert ranked[0] == name
    assert errors[name] > 10 * errors[ranked[1]]
    assert choose_excluded(errors, weight_bytes(model))[0] == (name,)


def test_the_first_keep_list_restores_the_embedding(outlier: tuple[Path, str]) -> None:
    model, _ = outlier
    errors = measure_sensitivity(model, StaticInt8(), feeds, samples=SAMPLES)
    feed = images(8, seed=7)  # held out
    reference = embed(model, feed)

    def cosine(keep: tuple[str, ...]) -> float:
        return float((embed(static_int8(model, keep), feed) * reference).sum(axis=1).mean())

    lists = choose_excluded(errors)
    found = [cosine(keep) for keep in ((), *lists[:3])]
    assert found[0] < 0.99
    assert found[1] > 0.999
    assert found[3] > found[1]


def test_errors_of_single_nodes_nearly_add_up(layout: Path) -> None:
    errors = measure_sensitivity(layout, StaticInt8(), feeds, samples=SAMPLES)
    whole = measure_errors(layout, StaticInt8(), feeds, samples=SAMPLES, alone=False)
    # With all but one quantized the error is near to the sum of the others'.
    for name, rows in whole.items():
        rest = sum(error for other, error in errors.items() if other != name)
        assert 0.4 * rest < rows.mean() < 2.5 * rest


def test_only_the_node_in_question_is_quantized(layout: Path) -> None:
    """Of the graph that is measured, the error is that of a graph made by hand."""
    name = quantizable_nodes(layout, StaticInt8())[4]
    others = tuple(set(quantizable_nodes(layout, StaticInt8())) - {name})
    (found,) = measure_errors(layout, StaticInt8(), feeds, samples=2, nodes=[name]).values()
    feed = next(feeds())
    pair = embed(static_int8(layout, others), feed), embed(layout, feed)
    exact = 1 - (pair[0].astype(np.float64) * pair[1]).sum(axis=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0.02, atol=2e-7)


def test_embedding_tables_are_measured_and_excluded_like_layers(tmp_path: Path) -> None:
    model = laid_out(text_tower(tmp_path / "text.onnx"))
    (table,) = quantizable_tables(ir.load(model).graph)
    errors = measure_sensitivity(model, DynamicInt8(), text_feeds, samples=SAMPLES)
    assert errors[table] > 0
    assert weight_bytes(model)[table] == max(weight_bytes(model).values())
    graph = ir.load(model)
    Int8Linears("dynamic", keep=[table])(graph)
    (lookup,) = quantizable_tables(graph.graph)[table]
    assert lookup.inputs[0] is not None
    assert lookup.inputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    "config", [WeightOnly(group_size=16), StaticInt8(bias_correction=True), Float8()], ids=str
)
def test_every_method_that_goes_layer_by_layer_is_measured(
    config: QuantizationConfig, layout: Path
) -> None:
    nodes = quantizable_nodes(layout, config)
    errors = measure_sensitivity(layout, config, feeds, samples=2)
    assert tuple(errors) == nodes
    assert len(nodes) >= 12
    assert all(0 < error < 0.1 for error in errors.values())


def test_excluded_layers_are_float_throughout(outlier: tuple[Path, str]) -> None:
    model, name = outlier
    config = StaticInt8(keep=(name,))
    errors = measure_errors(model, config, feeds, samples=2, alone=False)
    assert name not in errors
    # With the outlier's layer quantized, each of these would be above it.
    assert max(float(rows.mean()) for rows in errors.values()) < 1e-3


def test_data_is_read_as_far_as_needed_and_files_go(layout: Path) -> None:
    before = {path.name for path in layout.parent.iterdir()}
    name, other = quantizable_nodes(layout, DynamicInt8())[:2]
    rows = measure_errors(
        layout,
        DynamicInt8(),
        feeds,
        samples=3,
        nodes=[name, other],
    )
    assert {name: found.shape for name, found in rows.items()} == {name: (4,), other: (4,)}
    assert {path.name for path in layout.parent.iterdir()} == before


def test_a_crash_of_the_engine_names_the_layer_and_leaves_nothing(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_on(".graph.*", tmp_path, monkeypatch)
    before = {path.name for path in layout.parent.iterdir()}
    name = re.escape(quantizable_nodes(layout, DynamicInt8())[0])
    message = rf"with only '{name}' quantized: onnxruntime crashed \(SIGSEGV\)"
    with pytest.raises(BackendError, match=message):
        measure_sensitivity(layout, DynamicInt8(), feeds, samples=2)
    assert {path.name for path in layout.parent.iterdir()} == before


def test_no_data_and_methods_that_do_not_go_layer_by_layer(layout: Path) -> None:
    with pytest.raises(CalibrationError, match="got 0 samples"):
        measure_sensitivity(layout, DynamicInt8(), lambda: iter(()))
    with pytest.raises(QuantizationError, match="Float16: it does not go layer by layer"):
        measure_sensitivity(layout, Float16(), feeds)


def test_activations_that_are_not_finite_are_named(layout: Path) -> None:
    def broken() -> Iterator[dict[str, Array]]:
        for feed in feeds():
            yield {"pixel_values": feed["pixel_values"] * np.float32("nan")}

    with pytest.raises(QuantizationError, match="NaN"):
        measure_sensitivity(layout, StaticInt8(), broken)
    with pytest.raises(
        QuantizationError, match=re.escape(quantizable_nodes(layout, DynamicInt8())[0])
    ):
        measure_sensitivity(layout, DynamicInt8(), broken)


def test_keep_lists_double_and_begin_with_one_another() -> None:
    errors = {f"n{i}": float(i) for i in range(12)}
    lists = choose_excluded(errors)
    assert [len(keep) for keep in lists] == [1, 2, 4, 8, 11]
    assert lists[0] == ("n11",)
    for shorter, longer in pairwise(lists):
        assert longer[: len(shorter)] == shorter
    assert "n0" not in lists[-1]  # without error, nothing is gained by keeping it
    assert [len(keep) for keep in choose_excluded(errors, limit=5)] == [1, 2, 4, 5]
    assert choose_excluded({}) == ()
    assert choose_excluded({"only": 1.0}) == ()
    assert choose_excluded({"a": 0.0, "b": 0.0}) == ()


def test_costs_weigh_and_equals_keep_their_order() -> None:
    errors = {"a": 1.0, "b": 3.0, "c": 1.0}
    assert choose_excluded(errors, limit=3) == (("b",), ("b", "a"))
    assert choose_excluded(errors, {"a": 1, "b": 10, "c": 1})[-1] == ("a", "c")


@pytest.mark.parametrize(
    ("errors", "costs"),
    [
        ({"a": float("nan"), "b": 1.0}, None),
        ({"a": 1.0, "b": 1.0}, {"b": 1}),
        ({"a": 1.0, "b": 1.0}, {"a": 0, "b": 1}),
    ],
    ids=str,
)
def test_unrankable_nodes_are_named(
    errors: dict[str, float], costs: dict[str, float] | None
) -> None:
    with pytest.raises(QuantizationError, match="Cannot rank 'a'"):
        choose_excluded(errors, costs)
