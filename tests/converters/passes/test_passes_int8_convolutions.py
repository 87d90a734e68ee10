"""Int8 convolutions in both forms."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from towers import convolution_network, images

from mmedge.converters.methods.configs import DynamicInt8, StaticInt8
from mmedge.converters.passes.convolutions import find_convolutions
from mmedge.converters.passes.int8_convolutions import (
    Int8Convolutions,
    convolution_values,
    quantizable_convolutions,
)
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quantization.sensitivity import measure_sensitivity, quantizable_nodes
from mmedge.errors import QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.onnx_file import PAIRED_KEY
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array

Form = Literal["operators", "qdq"]
METHODS = {
    "operators": StaticInt8(),
    "qdq": StaticInt8(form="qdq"),
    "symmetric": StaticInt8(form="qdq", activations="int8"),
    "half": StaticInt8(form="qdq", activations="int8", rest="float16"),
    "paired": StaticInt8(paired=True),
    "mse": StaticInt8(ranges="mse"),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolution_network(tmp_path_factory.mktemp("network") / "network.onnx")


def feeds() -> list[dict[str, Array]]:
    return [images(4, seed=seed) for seed in range(4)]


def run(model: Path, backend: str = "onnxruntime") -> Array:
    with open_session(model, backend_name=backend) as session:
        return session.run(images(6, seed=77))["embeds"]


@pytest.mark.parametrize("name", METHODS)
def test_every_form_reaches_the_convolutions_and_stays_near_float(
    name: str, network: Path, tmp_path: Path
) -> None:
    entries = quantize(network, tmp_path / "int8.onnx", METHODS[name], calibration=feeds)
    kinds = Counter((entry.op_type, entry.precision) for entry in entries)
    rest = METHODS[name].rest
    assert kinds == {("Conv", "int8"): 7, ("Conv", rest): 2, ("Gemm", rest): 1}
    for entry in entries:
        if entry.precision == "int8":
            assert entry.low is not None
            assert entry.weight_error is not None
            assert 0 < entry.weight_error < 0.03
    cosines = (run(tmp_path / "int8.onnx") * run(network)).sum(axis=1)
    assert cosines.min() > 0.99
    assert cosines.min() < 1 - 1e-7  # it is quantized


def test_openvino_runs_the_portable_form(network: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    quantize(network, tmp_path / "int8.onnx", METHODS["qdq"], calibration=feeds)
    cosines = (run(tmp_path / "int8.onnx", "openvino") * run(network)).sum(axis=1)
    assert cosines.min() > 0.99


def test_onnxruntime_computes_the_convolutions_in_int8(network: Path, tmp_path: Path) -> None:
    """As it names the kernels that have run, in its own profile."""
    quantize(network, tmp_path / "int8.onnx", METHODS["operators"], calibration=feeds)
    options = SessionOptions(profile_to=tmp_path / "profile")
    with open_session(tmp_path / "int8.onnx", options=options) as session:
        session.run(images(1))
    (profile,) = (tmp_path / "profile").glob("*.json")
    ran = Counter(
        event["args"]["op_name"]
        for event in json.loads(profile.read_text())
        if event.get("cat") == "Node" and "op_name" in event.get("args", {})
    )
    assert ran["QLinearConv"] == 7
    assert ran["QLinearAdd"] == 2
    assert ran["Conv"] + ran["FusedConv"] == 2
    assert not ran["Relu"]


@pytest.mark.parametrize("form", ["operators", "qdq"])
def test_the_portable_form_quantizes_what_convolutions_read_alone(
    form: Form, network: Path
) -> None:
    model = ir.load(network)
    chosen = quantizable_convolutions(model.graph)
    names = convolution_values(model.graph, form)
    assert len(set(names)) == len(names)
    read = {one.x.name for one in chosen}
    assert read <= set(names)
    assert (read == set(names)) == (form == "qdq")


def test_a_residual_addition_reads_the_quantized_value(network: Path, tmp_path: Path) -> None:
    """So that TensorRT adds in the convolution."""
    quantize(network, tmp_path / "int8.onnx", METHODS["symmetric"], calibration=feeds)
    graph = ir.load(tmp_path / "int8.onnx").graph
    made_by = [
        sorted(value.producer().op_type for value in node.inputs if value is not None)
        for node in graph
        if node.op_type == "Add"
    ]
    assert made_by == [["Conv", "DequantizeLinear"]] * 2
    biases = [node.inputs[2] for node in graph if node.op_type == "Conv"]
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for value in biases)


def test_a_pool_keeps_the_scale(network: Path, tmp_path: Path) -> None:
    quantize(network, tmp_path / "int8.onnx", METHODS["operators"], calibration=feeds)
    graph = ir.load(tmp_path / "int8.onnx").graph
    (pool,) = (node for node in graph if node.op_type == "MaxPool")
    before = pool.inputs[0].producer()
    (after,) = pool.outputs[0].consumers()
    assert (before.op_type, after.op_type) == ("DequantizeLinear", "QuantizeLinear")
    for at in (1, 2):
        first, second = (node.inputs[at].const_value.numpy() for node in (before, after))
        np.testing.assert_array_equal(first, second)


def test_excluded_convolutions_stay_in_float(network: Path, tmp_path: Path) -> None:
    names = [one.name for one in quantizable_convolutions(ir.load(network).graph)]
    for form in ("operators", "qdq"):
        config = StaticInt8(form=form, keep=tuple(names[:3]))  # type: ignore[arg-type]
        entries = quantize(network, tmp_path / f"{form}.onnx", config, calibration=feeds)
        reasons = {entry.name: entry.reason for entry in entries}
        assert {reasons[name] for name in names[:3]} == {"among the most sensitive layers"}
        assert {reasons[name] for name in names[3:]} == {""}
        others = [reason for name, reason in reasons.items() if name not in names]
        assert sorted(others) == [
            "a convolution of a single place, no faster in int8",
            "a depthwise convolution, no faster in int8",
            "makes the embedding",
        ]
        assert (run(tmp_path / f"{form}.onnx") * run(network)).sum(axis=1).min() > 0.99


def test_one_that_makes_an_output_stays_in_float(network: Path) -> None:
    model = ir.load(network)
    last = find_convolutions(model.graph)[-1]
    model.graph.outputs.append(last.output)
    assert last.name not in {one.name for one in quantizable_convolutions(model.graph)}


def test_sensitivity_is_measured_for_convolutions(network: Path) -> None:
    chosen = [one.name for one in quantizable_convolutions(ir.load(network).graph)]
    assert list(quantizable_nodes(network, StaticInt8())) == chosen
    errors = measure_sensitivity(network, StaticInt8(), feeds, samples=4)
    assert list(errors) == chosen
    assert all(0 < error < 0.01 for error in errors.values())


def test_dynamic_int8_says_that_convolutions_need_calibration(
    network: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=r"int8-static alone.*--calibration"):
        quantize(network, tmp_path / "int8.onnx", DynamicInt8())


@pytest.mark.parametrize("form", ["operators", "qdq"])
def test_a_missing_range_is_named(form: Form, network: Path) -> None:
    with pytest.raises(QuantizationError, match="No calibrated range for"):
        Int8Convolutions(form, {})(ir.load(network))


def test_a_kernel_that_is_not_finite_is_named(network: Path) -> None:
    model = ir.load(network)
    first = find_convolutions(model.graph)[0]
    values = np.full(first.weight.shape.numpy(), np.nan, np.float32)  # type: ignore[union-attr]
    first.weight.const_value = ir.tensor(values, name=first.weight.name)
    with pytest.raises(QuantizationError, match=f"'{first.weight.name}' holds NaN"):
        Int8Convolutions("qdq", {})(model)


def test_paired_kernels_cannot_saturate(network: Path, tmp_path: Path) -> None:
    quantize(network, tmp_path / "int8.onnx", METHODS["paired"], calibration=feeds)
    model = ir.load(tmp_path / "int8.onnx")
    assert model.metadata_props[PAIRED_KEY] == "true"
    kernels = [
        value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if name.endswith("_int8") and value.const_value is not None
    ]
    assert len(kernels) == 7
    assert all(np.abs(kernel.astype(np.int32)).max() == 64 for kernel in kernels)
