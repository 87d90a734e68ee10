"""Norms folded into convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from towers import convolution_network, images

from mmedge.converters.passes.batch_norm import FoldBatchNorm
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array


def run(model: Path) -> Array:
    with open_session(model) as session:
        return session.run(images(3))["embeds"]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("norm", ["affine", "batch"])
def test_every_norm_goes_into_its_convolution(norm: str, tmp_path: Path) -> None:
    source = convolution_network(tmp_path / "network.onnx", norm=norm)
    plain = operators(ir.load(convolution_network(tmp_path / "plain.onnx", norm="none")))
    model = ir.load(source)
    assert FoldBatchNorm()(model).modified
    assert operators(model) == plain
    ir.save(model, tmp_path / "folded.onnx")
    np.testing.assert_allclose(run(tmp_path / "folded.onnx"), run(source), atol=2e-6)


def _second_reader(model: ir.Model, conv: ir.Node, _norm: ir.Node) -> None:
    other = ir.node("Identity", [conv.outputs[0]])
    other.outputs[0].name = "other"
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])


def _shared_kernel(model: ir.Model, conv: ir.Node, _norm: ir.Node) -> None:
    twin = ir.node("Conv", conv.inputs, {"kernel_shape": [3, 3], "strides": [2, 2]})
    twin.outputs[0].name = "other"
    model.graph.append(twin)
    model.graph.outputs.append(twin.outputs[0])


def _by_place(model: ir.Model, _conv: ir.Node, norm: ir.Node) -> None:
    at = next(i for i, value in enumerate(norm.inputs) if value and value.is_initializer())
    factor = ir.Value(
        name="by_place",
        const_value=ir.tensor(np.full((1, 16, 1, 12), 2.0, np.float32), name="by_place"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape((1, 16, 1, 12)),
    )
    model.graph.register_initializer(factor)
    norm.replace_input_with(at, factor)


def _training(_model: ir.Model, _conv: ir.Node, norm: ir.Node) -> None:
    norm.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)


@pytest.mark.parametrize(
    ("norm", "change"),
    [
        ("affine", _second_reader),
        ("batch", _second_reader),
        ("batch", _shared_kernel),
        ("affine", _by_place),
        ("batch", _training),
    ],
)
def test_what_others_read_or_what_is_no_norm_by_channel_stays(
    norm: str, change: Callable[[ir.Model, ir.Node, ir.Node], None], tmp_path: Path
) -> None:
    model = ir.load(convolution_network(tmp_path / "network.onnx", norm=norm))
    first = next(node for node in model.graph if node.op_type == "Conv")
    reader = next(iter(first.outputs[0].consumers()))
    change(model, first, reader)
    FoldBatchNorm()(model)
    assert reader.graph is model.graph
    assert reader.inputs[0] is first.outputs[0] or reader.inputs[1] is first.outputs[0]
