"""Half precision, bfloat16, fp8: what stays in float32 and why, how near the outputs stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from towers import image_tower, images, text_tower, texts

from mmedge.converters.passes.bfloat16 import emulate_bfloat16, to_bfloat16
from mmedge.converters.passes.float8 import (
    Float8Linears,
    quantize_weight_float8,
)
from mmedge.converters.passes.float16 import Float16Result, to_float16
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.passes.narrowing import ComputeInFloat32, NarrowFloats
from mmedge.converters.quantization.float16_check import require_agreement
from mmedge.converters.statistics.collect import collect_ranges
from mmedge.converters.statistics.peaks import collect_peaks
from mmedge.errors import BackendError, CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

HALF, BRAIN = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TOWERS: dict[str, tuple[Callable[[Path], Path], Callable[[int], dict[str, Array]]]] = {
    "image": (image_tower, lambda seed: images(3, seed)),
    "text": (text_tower, lambda seed: texts(3, 9, seed)),
}
FC1, FC2 = (32, 64), (64, 32)


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    return TOWERS[request.param][0](tmp_path / f"{request.param}.onnx"), request.param


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


def feeds(kind: str = "image") -> Callable[[], Iterator[dict[str, Array]]]:
    return lambda: (TOWERS[kind][1](seed) for seed in range(100, 104))


def save(model: ir.Model, out: Path) -> Path:
    ir.save(model, out, external_data=f"{out.name}.data")
    onnx.checker.check_model(out, full_check=True)
    return out


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def emulated(model: Path) -> Path:
    """Every half-precision value rounded, which ONNX Runtime's CPU kernels need not do."""
    graph = ir.load(model)
    ComputeInFloat32(HALF)(graph)
    return save(graph, model.with_name("emulated.onnx"))


def cosine(first: Array, second: Array) -> float:
    return float((first * second).sum(axis=1).min())


def casts(model: ir.Model) -> int:
    floats = (ir.DataType.FLOAT, HALF, BRAIN)
    return sum(n.op_type == "Cast" and n.outputs[0].dtype in floats for n in model.graph)


def scaled(path: Path, shape: tuple[int, int], factor: float) -> tuple[Path, ir.Node]:
    """Scale the weight of the first linear layer of a shape."""
    model = ir.load(path)
    linear = next(linear for linear in find_linears(model.graph) if linear.shape == shape)
    weight = linear.weight.const_value
    assert weight is not None
    linear.weight.const_value = ir.tensor(weight.numpy() * np.float32(factor), name=weight.name)
    return save(model, path.with_name("scaled.onnx")), linear.node


def graph_file(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Array]) -> Path:
    """Write nodes from x (batch, 8) to embeds."""
    shape = ["batch", 8]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("embeds", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def kept(result: Float16Result) -> dict[str, str]:
    return {op.name: op.reason for op in result.fp32_ops}


# float16


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_plain_tower_is_all_half_but_the_normalization_of_the_output(
    calibrated: bool, tower: tuple[Path, str]
) -> None:
    path, kind = tower
    result = to_float16(path, collect_peaks(path, feeds(kind)) if calibrated else None)
    assert set(kept(result).values()) == {"makes the float32 output"}
    assert {op.op_type for op in result.fp32_ops} == {"ReduceL2", "Div"}
    # One cast where images come in, one where the embedding is normalized.
    assert casts(result.model) == (2 if kind == "image" else 1)
    floats = [v.dtype for v in result.model.graph.initializers.values()]
    assert ir.DataType.FLOAT not in floats
    assert HALF in floats
    for value in (*result.model.graph.inputs, *result.model.graph.outputs):
        assert value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)
    out = save(result.model, path.with_name("half.onnx"))
    assert Path(f"{out}.data").is_file()
    feed = TOWERS[kind][1](1)
    expected = run(path, feed)
    assert cosine(run(out, feed), expected) > 0.99999
    assert cosine(run(emulated(out), feed), expected) > 0.99999


def test_values_beyond_half_precision_are_found_on_the_data_and_stay_in_float32(
    image: Path,
) -> None:
    big, node = scaled(image, FC2, 5e4)
    feed = images(4)
    expected = run(big, feed)
    naive = ir.load(big)
    NarrowFloats(HALF)(naive)
    assert not np.isfinite(run(save(naive, big.with_name("naive.onnx")), feed)).all()

    result = to_float16(big, collect_peaks(big, feeds()))
    reasons = kept(result)
    assert node.name in reasons
    assert f"'{node.outputs[0].name}' reaches 2" in reasons[node.name]
    assert len(reasons) < len(list(result.model.graph)) / 4
    out = save(result.model, big.with_name("half.onnx"))
    assert cosine(run(emulated(out), feed), expected) > 0.9999
    # The residual stream leaves and enters half precision; nothing bounces within an fp32 region.
    for cast in (n for n in result.model.graph if n.op_type == "Cast"):
        source = cast.inputs[0]
        assert source is not None
        made = source.producer()
        assert made is None or made.op_type != "Cast"


def test_without_data_overflow_of_values_is_not_seen_and_the_check_names_the_node(
    image: Path,
) -> None:
    big, node = scaled(image, FC2, 5e4)
    out = save(to_float16(big).model, big.with_name("half.onnx"))
    before = sorted(big.parent.iterdir())
    with pytest.raises(
        QuantizationError, match=r"not finite is 'matmul_.*made by MatMul"
    ) as caught:
        require_agreement(big, out, feeds())
    assert f"MatMul '{node.name}'" in str(caught.value)
    assert sorted(big.parent.iterdir()) == before


def test_agreement_is_the_smallest_cosine(tower: tuple[Path, str]) -> None:
    path, kind = tower
    for made in (to_float16(path).model, to_bfloat16(path)):
        out = save(made, path.with_name("narrow.onnx"))
        assert 0.999 < require_agreement(path, out, feeds(kind)) <= 1.0
    with pytest.raises(CalibrationError, match="got 0 samples"):
        require_agreement(path, out, lambda: iter(()))


def test_an_inaccurate_output_is_refused(image: Path) -> None:
    other, node = scaled(image, FC1, -3.0)
    with pytest.raises(QuantizationError, match=rf"is off is '.*made by MatMul '{node.name}'"):
        require_agreement(image, other, feeds())


def test_weights_beyond_half_precision_stay_in_float32(image: Path) -> None:
    big, node = scaled(image, FC1, 1e6)
    result = to_float16(big)
    assert "beyond float16" in kept(result)[node.name]
    weight = result.model.graph.node(node.name).inputs[1]
    assert weight is not None
    assert weight.dtype == ir.DataType.FLOAT


def test_weights_too_small_for_half_precision_stay_in_float32(image: Path) -> None:
    small, node = scaled(image, FC1, 1e-7)
    assert "of its norm in float16" in kept(to_float16(small))[node.name]


def test_a_weight_that_is_nan_is_named(image: Path) -> None:
    broken, node = scaled(image, FC1, float("nan"))
    assert node.inputs[1] is not None
    with pytest.raises(QuantizationError, match=f"Weight '{node.inputs[1].name}' holds NaN"):
        to_float16(broken)


def test_an_epsilon_that_would_become_zero_keeps_its_addition_in_float32(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("Mul", ["x", "x"], ["square"], "square"),
            helper.make_node("Add", ["square", "eps"], ["shifted"], "shift"),
            helper.make_node("Div", ["x", "shifted"], ["embeds"], "divide"),
        ],
        {"eps": np.array(1e-12, np.float32)},
    )
    assert set(kept(to_float16(path))) == {"shift"}


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_values_nowhere_above_the_smallest_normal_stay_in_float32(
    size: float, tmp_path: Path
) -> None:
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("Relu", ["x"], ["r"], "relu"),
            helper.make_node("Neg", ["r"], ["embeds"], "neg"),
        ],
        {},
    )
    feed = {"x": np.full((2, 8), size, np.float32)}
    reasons = kept(to_float16(path, collect_peaks(path, lambda: [feed])))
    assert set(reasons) == (set() if size == 1.0 else {"relu", "neg"})


def test_a_sum_that_overflows_on_the_way_stays_in_float32(tmp_path: Path) -> None:
    """The product is 0, its partial sums are not."""
    weight = np.full((8, 8), 200.0, np.float32)
    weight[4:] *= -1
    path = graph_file(
        tmp_path / "g.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["embeds"], "product")],
        {"w": weight},
    )
    feed = {"x": np.full((2, 8), 100.0, np.float32)}
    peaks = collect_peaks(path, lambda: [feed])
    assert peaks["embeds"].largest == 0
    assert peaks["embeds"].inside == 8 * 200 * 100
    assert "sums up to 1.6e+05" in kept(to_float16(path, peaks))["product"]


def test_attention_of_large_scores_stays_in_float32(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["scores"], "product"),
            helper.make_node("Add", ["scores", "mask"], ["masked"], "add"),
            helper.make_node("Softmax", ["masked"], ["embeds"], "softmax"),
        ],
        {
            "w": np.eye(8, dtype=np.float32),
            "mask": np.array([0] * 7 + [np.finfo(np.float32).min], np.float32),
        },
    )
    for size, expected in ((10.0, set()), (1000.0, {"product", "add", "softmax"})):
        feed = {"x": np.linspace(0, size, 8, dtype=np.float32)[None]}
        result = to_float16(path, collect_peaks(path, lambda feed=feed: [feed]))  # type: ignore[misc]
        assert set(kept(result)) == expected
        out = save(result.model, tmp_path / "half.onnx")
        np.testing.assert_allclose(run(emulated(out), feed), run(path, feed), atol=1e-2)


def test_no_data_and_nan_in_the_data_are_errors(image: Path) -> None:
    with pytest.raises(CalibrationError, match="got 0 samples"):
        collect_peaks(image, lambda: iter(()))
    feed = images(2)
    feed["pixel_values"][1, 0, 3, 3] = np.nan
    with pytest.raises(QuantizationError, match="'pixel_values' is NaN"):
        collect_peaks(image, lambda: [feed])


def test_a_weight_read_in_both_types_is_stored_in_both(tmp_path: Path) -> None:
    weight = np.full(8, 1 / 3, np.float32)
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("Mul", ["x", "w"], ["wide"], "wide"),
            helper.make_node("Mul", ["wide", "w"], ["embeds"], "narrow"),
        ],
        {"w": weight},
    )
    model = ir.load(path)
    NarrowFloats(HALF, [model.graph.node("wide")])(model)
    held = {
        v.name: v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value
    }
    assert held["w"].dtype == np.float16
    np.testing.assert_array_equal(held["w_float32"], weight)


def test_operators_that_know_no_half_precision_stay_in_float32(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("Range", ["zero", "eight", "one"], ["steps"], "range"),
            helper.make_node("Mul", ["x", "steps"], ["embeds"], "mul"),
        ],
        {
            "zero": np.array(0, np.float32),
            "eight": np.array(8, np.float32),
            "one": np.array(1, np.float32),
        },
    )
    out = save(to_float16(path).model, tmp_path / "half.onnx")
    x = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(run(out, {"x": x}), x * np.arange(8))


# bfloat16


def test_bfloat16_is_a_valid_graph_and_its_emulation_runs(tower: tuple[Path, str]) -> None:
    path, kind = tower
    model = to_bfloat16(path)
    assert casts(model) == (2 if kind == "image" else 1)
    out = save(model, path.with_name("brain.onnx"))
    stored = ir.load(out)
    types = Counter(v.dtype for v in stored.graph.initializers.values())
    assert types[BRAIN]
    assert not types[ir.DataType.FLOAT]
    assert stored.graph.outputs[0].dtype == ir.DataType.FLOAT

    seen = path.with_name("seen.onnx")
    ir.save(emulate_bfloat16(out), seen)  # beside it: the weights are read from its data
    assert seen.stat().st_size < Path(f"{out}.data").stat().st_size * 3
    feed = TOWERS[kind][1](1)
    assert 0.999 < cosine(run(seen, feed), run(path, feed)) < 0.9999999


def test_bfloat16_needs_no_islands_where_half_precision_does(image: Path) -> None:
    big, _ = scaled(image, FC2, 5e4)
    out = save(to_bfloat16(big), big.with_name("brain.onnx"))
    assert require_agreement(big, out, feeds()) > 0.999


def test_onnxruntime_on_cpu_refuses_bfloat16(image: Path) -> None:
    out = save(to_bfloat16(image), image.with_name("brain.onnx"))
    with pytest.raises(BackendError, match="Could not find an implementation"):
        run(out, images(1))


# fp8


def float8(path: Path, kind: str, keep: tuple[str, ...] = ()) -> ir.Model:
    model = ir.load(path)
    Float8Linears(collect_ranges(path, quantizable_inputs(model, keep), feeds(kind)), keep)(model)
    return model


def test_fp8_computes_in_the_format(tmp_path: Path) -> None:
    """Both factors rounded to three binary digits over one scale each, summed in float."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    path = graph_file(
        tmp_path / "g.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["product"], "product"),
            helper.make_node("Relu", ["product"], ["embeds"], "relu"),
        ],
        {"w": weight},
    )
    x = rng.standard_normal((500, 8)).astype(np.float32)
    model = ir.load(path)
    Float8Linears(collect_ranges(path, ["x"], lambda: [{"x": x}]))(model)
    got = run(save(model, tmp_path / "fp8.onnx"), {"x": x})

    def rounded(array: Array) -> Array:
        scale = np.abs(array).max() / np.float32(448)
        return (array / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    np.testing.assert_allclose(got, np.maximum(rounded(x) @ rounded(weight), 0), atol=1e-5)
    exact = np.maximum(x @ weight, 0)
    # A step of 1/8 of a binade is 2.6 % of a number (rms); two factors, so 3.7 % of a product.
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.045


def test_fp8_keeps_the_embedding(tower: tuple[Path, str]) -> None:
    path, kind = tower
    out = save(float8(path, kind), path.with_name("fp8.onnx"))
    feed = TOWERS[kind][1](1)
    # 3.7 % a product, about ten one after the other: 1 - 10 * 0.037 ** 2.
    assert cosine(run(out, feed), run(path, feed)) > 0.985


def test_fp8_leaves_excluded_layers_and_the_embedding_in_float(image: Path) -> None:
    linears = find_linears(ir.load(image).graph)
    name = linears[1].name
    model = float8(image, "image", (name,))
    held = {n: v.dtype for n, v in model.graph.initializers.items()}
    assert held[linears[1].weight.name or ""] == ir.DataType.FLOAT
    assert held[linears[-1].weight.name or ""] == ir.DataType.FLOAT
    quantized = [
        n for n, d in held.items() if n.endswith("_float8") and d == ir.DataType.FLOAT8E4M3FN
    ]
    assert len(quantized) == len(linears) - 2


def test_fp8_of_nothing_and_without_ranges_is_refused(image: Path) -> None:
    everything = [linear.name for linear in find_linears(ir.load(image).graph)]
    with pytest.raises(QuantizationError, match="Nothing to quantize"):
        Float8Linears({}, everything)(ir.load(image))
    with pytest.raises(QuantizationError, match="No calibrated range for"):
        Float8Linears({})(ir.load(image))


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-3, 1.0, 1e30])
def test_fp8_values_are_finite_and_near_at_any_size(size: float) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32) * np.float32(
        size
    )
    quantized, scale = quantize_weight_float8(weight)
    assert quantized.dtype == ml_dtypes.float8_e4m3fn
    back = quantized.astype(np.float32) * np.float32(scale)
    assert np.isfinite(back).all()
    # Three binary digits behind the first: at most a sixteenth off, 2^-10 steps below 2^-6.
    np.testing.assert_allclose(back, weight, rtol=1 / 16, atol=max(scale * 2.0**-10, 1e-40))


# The forms that TensorRT takes; see docs. Built with TensorRT-RTX 1.7 when they were written.


def dequantized(model: ir.Model, code: ir.DataType) -> list[tuple[ir.Node, ir.Node]]:
    """Return both DequantizeLinear of every product in a quantized type."""
    pairs = []
    for node in model.graph:
        sides = [v.producer() if v is not None else None for v in node.inputs]
        if node.op_type == "MatMul" and all(s and s.op_type == "DequantizeLinear" for s in sides):
            left, right = sides
            assert left is not None
            assert right is not None
            assert [s.inputs[2].dtype for s in (left, right) if s.inputs[2]] == [code] * 2
            pairs.append((left, right))
    return pairs


@pytest.mark.parametrize("rest", ["float32", "float16"])
@pytest.mark.parametrize("code", [ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8])
def test_tensorrt_takes_symmetric_qdq_around_products_with_weights_only(
    code: ir.DataType, rest: str, tower: tuple[Path, str]
) -> None:
    """Signed, zero points 0, weights stored quantized, q/k/v reading one DequantizeLinear,
    no Q/DQ on attention's products of activations or on biases."""
    path, kind = tower
    if code == ir.DataType.INT8:
        model = ir.load(path)
        ranges = collect_ranges(path, quantizable_inputs(model), feeds(kind))
        Int8Linears("qdq", ranges, symmetric_activations=True)(model)
    else:
        model = float8(path, kind)
    if rest == "float16":
        model = to_float16(model).model
    out = save(model, path.with_name("qdq.onnx"))
    model = ir.load(out)
    pairs = dequantized(model, code)
    assert len(pairs) == len(find_linears(ir.load(path).graph)) - 1
    for activation, weight in pairs:
        assert weight.inputs[0] is not None
        assert weight.inputs[0].is_initializer()
        for side in (activation, weight):
            scale, zero = side.inputs[1], side.inputs[2]
            assert scale is not None
            assert zero is not None
            assert zero.const_value is not None
            assert scale.dtype == (HALF if rest == "float16" else ir.DataType.FLOAT)
            assert not zero.const_value.numpy().astype(np.float32).any()
    shared = Counter(left for left, _ in pairs)
    assert sorted(shared.values()).count(3) == 2  # q, k and v of two blocks
    quantized = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert len(quantized) == len(shared)
    feed = TOWERS[kind][1](1)
    assert cosine(run(out, feed), run(path, feed)) > 0.98
