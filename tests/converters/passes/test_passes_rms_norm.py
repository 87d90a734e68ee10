"""RMS normalization becomes one node, and what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from towers import grouped_tower

from mmedge.converters.passes.rms_norm import FuseRmsNorm


def loaded(tmp_path: Path) -> ir.Model:
    return ir.load(grouped_tower(tmp_path / "given.onnx", blocks=1))


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def test_seven_nodes_become_one(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    before = len(list(model.graph))
    assert FuseRmsNorm()(model).modified
    fused = node_of(model, "RMSNormalization")
    assert fused.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert before - len(list(model.graph)) == 6
    assert model.graph.opset_imports[""] == 23


def cubed(model: ir.Model) -> None:
    square = node_of(model, "Pow")
    square.inputs[1].const_value = ir.tensor(np.float32(3), name="three")  # type: ignore[union-attr]


def over_the_tokens(model: ir.Model) -> None:
    mean = node_of(model, "ReduceMean")
    mean.inputs[1].const_value = ir.tensor(np.array([1]), name="axes")  # type: ignore[union-attr]


def of_another_value(model: ir.Model) -> None:
    square = node_of(model, "Pow")
    table = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    square.replace_input_with(0, table)


def read_twice(model: ir.Model) -> None:
    root = node_of(model, "Reciprocal").outputs[0]
    model.graph.outputs.append(root)


def group_norm_beside(model: ir.Model) -> None:
    model.graph.append(ir.node("GroupNormalization", [None, None, None], num_outputs=1))


@pytest.mark.parametrize(
    "change", [cubed, over_the_tokens, of_another_value, read_twice, group_norm_beside]
)
def test_another_pattern_stays(change: Callable[[ir.Model], None], tmp_path: Path) -> None:
    model = loaded(tmp_path)
    change(model)
    assert not FuseRmsNorm()(model).modified
    assert all(node.op_type != "RMSNormalization" for node in model.graph)
