"""Statistics of activations against numpy's, over both layouts of a tower."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, save
from towers import image_tower, images, text_tower, texts

from mmedge.converters.graphs.probe import Probe
from mmedge.converters.methods.configs import RangeMethod
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import quantizable_inputs
from mmedge.converters.statistics.collect import (
    Feeds,
    collect_channels,
    collect_moments,
    collect_ranges,
)
from mmedge.converters.statistics.ranges import BINS
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy", "mse")


def feeds() -> Iterator[dict[str, Array]]:
    for seed in range(4):
        yield images(1 + seed, seed=100 + seed)


@pytest.fixture(params=["portable", "onnxruntime"])
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return laid_out(image_tower(tmp_path / "image.onnx"), request.param)


def laid_out(portable: Path, layout: str) -> Path:
    if layout == "portable":
        return portable
    out = portable.with_name(f"{portable.stem}.ort.onnx")
    to_onnxruntime_layout(portable, out)
    return out


def names_of(model: Path) -> list[str]:
    """The activations that int8 asks for, an input of the graph, and one in the middle."""
    graph = ir.load(model).graph
    inputs = [value.name or "" for value in graph.inputs if value.dtype == ir.DataType.FLOAT]
    middle = next(node for node in graph if node.op_type == "Sigmoid").outputs[0]
    return [*quantizable_inputs(ir.load(model)), *inputs, middle.name or ""]


def activations(model: Path, names: Sequence[str], stream: Feeds) -> dict[str, list[Array]]:
    """The tensors themselves, batch by batch."""
    graph = ir.load(model)
    values = {v.name: v for node in graph.graph for v in node.outputs}
    wanted = [values[name] for name in names if name in values]
    for value in wanted:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.graph.outputs.extend(wanted)
    seeing = model.with_name("seeing.onnx")
    ir.save(graph, seeing)
    with open_session(seeing) as session:
        runs = [{**session.run(feed), **feed} for feed in stream()]
    seeing.unlink()
    return {name: [run[name] for run in runs] for name in names}


def rows(arrays: Sequence[Array]) -> Array:
    return np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])


def test_ranges_are_those_of_numpy(tower: Path) -> None:
    names = names_of(tower)
    got = collect_ranges(tower, names, feeds)
    assert list(got) == names
    for name, arrays in activations(tower, names, feeds).items():
        assert got[name].low == pytest.approx(rows(arrays).min(), rel=1e-5)
        assert got[name].high == pytest.approx(rows(arrays).max(), rel=1e-5)


def test_channels_are_those_of_numpy(tower: Path) -> None:
    names = names_of(tower)
    got = collect_channels(tower, names, feeds)
    assert list(got) == names
    for name, arrays in activations(tower, names, feeds).items():
        expected = rows(arrays)
        assert got[name].rows == len(expected)
        np.testing.assert_allclose(got[name].low, expected.min(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[name].high, expected.max(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[name].mean, expected.mean(axis=0), rtol=1e-4, atol=1e-6)
        assert got[name].mean.dtype == np.float32


def test_moments_are_those_of_numpy(tower: Path) -> None:
    names = names_of(tower)
    got = collect_moments(tower, names, feeds)
    assert list(got) == names
    for name, arrays in activations(tower, names, feeds).items():
        expected = rows(arrays).astype(np.float64)
        moment = expected.T @ expected / len(expected)
        np.testing.assert_allclose(got[name], moment, rtol=1e-4, atol=1e-5 * moment.max())
        assert got[name].dtype == np.float32


@pytest.mark.parametrize("layout", ["portable", "onnxruntime"])
def test_texts_of_several_lengths_are_taken(layout: str, tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Array]]:
        for length in (3, 7, 5):
            yield texts(2, length)

    model = laid_out(text_tower(tmp_path / "text.onnx"), layout)
    names = names_of(model)
    arrays = activations(model, names, stream)
    channels = collect_channels(model, names, stream)
    ranges = collect_ranges(model, names, stream, method="mse")
    moments = collect_moments(model, names, stream)
    for name in names:
        expected = rows(arrays[name])
        assert channels[name].rows == len(expected)
        np.testing.assert_allclose(channels[name].mean, expected.mean(axis=0), atol=1e-5)
        assert expected.min() - 1e-5 <= ranges[name].low <= ranges[name].high
        squares = (expected.astype(np.float64) ** 2).mean(axis=0)
        np.testing.assert_allclose(moments[name].diagonal(), squares, rtol=1e-4, atol=1e-5)


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    """A graph whose activation is what it is fed."""
    spec = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "c"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", spec[:1], spec[1:])
    path = tmp_path / "identity.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def cut(values: Array, sizes: Sequence[int]) -> Feeds:
    """Feeds of those many rows each, in that order."""
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return lambda: [{"x": part} for part in parts]


VALUES = np.random.default_rng(7).standard_normal((600, 8)).astype(np.float32) * 3 + 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_do_not_depend_on_batches_or_their_order(
    method: RangeMethod, symmetric: bool, identity: Path
) -> None:
    shuffled = np.random.default_rng(8).permutation(VALUES)
    got = [
        collect_ranges(identity, ["x"], stream, method=method, symmetric=symmetric)
        for stream in (cut(VALUES, [600]), cut(VALUES, [1, 399, 200]), cut(shuffled, [100] * 6))
    ]
    assert got[0] == got[1] == got[2]


def test_channels_and_moments_weigh_batches_by_their_rows(identity: Path) -> None:
    one, several = cut(VALUES, [600]), cut(VALUES, [1, 399, 200])
    first, second = (collect_channels(identity, ["x"], stream)["x"] for stream in (one, several))
    np.testing.assert_array_equal(first.low, second.low)
    np.testing.assert_array_equal(first.high, second.high)
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-5)
    assert first.rows == second.rows == 600
    moments = [collect_moments(identity, ["x"], stream)["x"] for stream in (one, several)]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_engine_counts_as_numpy_does(symmetric: bool, identity: Path) -> None:
    """A percentile of an even spread needs every bin's count."""
    values = np.linspace(-3, 1, 80_000, dtype=np.float32).reshape(-1, 8)
    got = collect_ranges(
        identity, ["x"], cut(values, [4000, 6000]), method="percentile", symmetric=symmetric
    )["x"]
    width = 4 / BINS
    cut_off = 4 * 1e-4
    assert got.low == pytest.approx(-3 + cut_off / (1 if symmetric else 2), abs=2 * width)
    assert got.high == pytest.approx(1 if symmetric else 1 - cut_off / 2, abs=2 * width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[2.0], [0.0], [-1.0, 1.0], [3e38, -3e38], [1e-40, 0.0]])
def test_hardly_any_values_are_enough(
    values: list[float], method: RangeMethod, identity: Path
) -> None:
    feed = {"x": np.array([values], np.float32)}
    got = collect_ranges(identity, ["x"], lambda: [feed], method=method)["x"]
    assert got.low == pytest.approx(feed["x"].min(), rel=0.05)
    assert got.high == pytest.approx(feed["x"].max(), rel=0.05)


def test_moments_in_groups_are_the_same(tower: Path) -> None:
    names = names_of(tower)
    readings = 0

    def counted() -> Iterator[dict[str, Array]]:
        nonlocal readings
        readings += 1
        yield from feeds()

    whole = collect_moments(tower, names, counted)
    assert readings == 2  # the first feed's shapes, then one group
    readings = 0
    single = collect_moments(tower, names, counted, budget_bytes=1)
    assert readings == 1 + len(names)
    for name in names:
        np.testing.assert_allclose(whole[name], single[name], rtol=1e-5, atol=1e-5)


def test_a_tensor_named_twice_is_measured_once(tower: Path) -> None:
    name = names_of(tower)[1]
    twice = [name, name]
    assert list(collect_ranges(tower, twice, feeds, method="mse")) == [name]
    assert (
        collect_channels(tower, twice, feeds)[name].rows
        == rows(activations(tower, [name], feeds)[name]).shape[0]
    )
    assert list(collect_moments(tower, twice, feeds)) == [name]


def test_memory_does_not_grow_with_the_data(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many arrays live at once over 20 batches as over 3, whatever is collected."""
    names = names_of(tower)
    alive: list[weakref.ref[Array]] = []
    most = 0
    run = Probe.run

    def watch(array: Array) -> None:
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(array))
        most = max(most, len(alive))

    def watched(probe: Probe, feed: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        results = run(probe, feed)
        for found in results.values():
            for array in found.values():
                watch(array)
        return results

    def most_alive(count: int) -> int:
        nonlocal most

        def stream() -> Iterator[Mapping[str, Array]]:
            for seed in range(count):
                feed = images(8, seed=seed)
                watch(feed["pixel_values"])
                yield feed

        most = 0
        collect_ranges(tower, names, stream, method="entropy")
        collect_channels(tower, names, stream)
        collect_moments(tower, names, stream)
        return most

    monkeypatch.setattr(Probe, "run", watched)
    assert most_alive(3) == most_alive(20)


def test_no_calibration_data_is_an_error(identity: Path) -> None:
    for collect in (collect_ranges, collect_channels, collect_moments):
        with pytest.raises(CalibrationError, match="got 0 samples"):
            collect(identity, ["x"], lambda: iter(()))


@pytest.mark.parametrize("collect", [collect_ranges, collect_channels, collect_moments])
def test_of_no_tensors_there_is_nothing_to_measure(
    collect: Callable[[Path, Sequence[str], Feeds], object], identity: Path
) -> None:
    # As GPTQ asks where only an embedding table is quantized: no product reads it.
    assert collect(identity, [], feeds) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 7), (599, 2)])
def test_values_that_are_not_finite_are_found_and_named(
    value: float, place: tuple[int, int], identity: Path
) -> None:
    broken = VALUES.copy()
    broken[place] = value
    for collect in (collect_ranges, collect_channels, collect_moments):
        with pytest.raises(QuantizationError, match="Activation 'x' is NaN or infinite"):
            collect(identity, ["x"], cut(broken, [300, 300]))


def test_a_last_axis_that_changes_is_no_channels(identity: Path) -> None:
    stream = [{"x": VALUES}, {"x": VALUES[:, :5]}]
    for collect in (collect_channels, collect_moments):
        with pytest.raises(QuantizationError, match=r"'x' has no channels.* is 8 .* and 5 in"):
            collect(identity, ["x"], lambda: stream)
    assert collect_ranges(identity, ["x"], lambda: stream)["x"].low == VALUES.min()


def test_a_name_that_is_no_float_tensor_is_an_error(tmp_path: Path) -> None:
    model = text_tower(tmp_path / "text.onnx")
    for collect in (collect_ranges, collect_channels, collect_moments):
        with pytest.raises(QuantizationError, match="'nowhere': no such tensor"):
            collect(model, ["nowhere"], lambda: [texts(2, 5)])
        with pytest.raises(QuantizationError, match="'input_ids': it is INT64"):
            collect(model, ["input_ids"], lambda: [texts(2, 5)])


def test_activations_never_leave_the_engine(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()
    run = Probe.run

    def watched(probe: Probe, feed: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        results = run(probe, feed)
        sizes.update(array.size for found in results.values() for array in found.values())
        return results

    monkeypatch.setattr(Probe, "run", watched)
    names = names_of(tower)
    channels = {moment.shape[0] for moment in collect_moments(tower, names, feeds).values()}
    collect_channels(tower, names, feeds)
    collect_ranges(tower, names, feeds, method="mse")
    scalar, shape = 1, 2
    assert sizes == {scalar, shape, BINS} | channels | {size**2 for size in channels}
