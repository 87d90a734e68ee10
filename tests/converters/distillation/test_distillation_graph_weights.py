"""What equalization does to a graph, done to the module: both compute what they did before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models.tiny_models import write_clip

from mmedge.converters.distillation.graph_weights import with_graph_weights, with_weights
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.clip import FAMILY
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import Equalization
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.variants.builder import lay_out
from mmedge.errors import QuantizationError
from mmedge.specs import Array


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RoleSpec]:
    folder = write_clip(tmp_path_factory.mktemp("source") / "clip")
    with quiet_libraries():
        source = open_source(str(folder))
        described = FAMILY.describe(source, FAMILY.load(source))
        return {name: make() for name, make in described.roles.items()}


def uneven(spec: RoleSpec) -> RoleSpec:
    """Gains and biases as of a trained model; what is all 1 or 0 is one constant in a graph."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: parameter + torch.randn(parameter.shape, generator=generator)
        for name, parameter in spec.module.named_parameters()
        if parameter.ndim == 1
    }
    return replace(spec, module=with_weights(spec.module, drawn))


def constants(path: Path) -> dict[str, Array]:
    held = ir.load(path).graph.initializers
    return {n: v.const_value.numpy() for n, v in held.items() if v.const_value is not None}


@pytest.mark.parametrize("role", ["image_encoder", "text_encoder"])
def test_an_equalized_module_is_the_equalized_graph(
    roles: Mapping[str, RoleSpec], role: str, tmp_path: Path
) -> None:
    spec = uneven(roles[role])
    name = spec.inputs[0].name
    sample = spec.sample({**spec.trace_sizes, "batch": 4}, 7)

    def feeds() -> Iterator[dict[str, Array]]:
        yield {name: sample[name].numpy()}

    with quiet_libraries():
        export_role(role, spec, tmp_path / "fp32.onnx")
    before = lay_out(tmp_path / "fp32.onnx")["onnxruntime"]
    after = Calibrator(feeds).equalized(before, Equalization(strength=0.5), "uint8")
    changed = with_graph_weights(spec.module, before, after)
    moved = [
        key
        for key, parameter in changed.named_parameters()
        if not torch.equal(parameter, spec.module.get_parameter(key))
    ]
    assert len(moved) > 12
    with torch.no_grad():
        expected, got = spec.module(sample[name]), changed(sample[name])
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-5)

    again = tmp_path / "again.onnx"
    with quiet_libraries():
        export_role(role, replace(spec, module=changed), again)
    wanted, found = constants(after), constants(lay_out(again)["onnxruntime"])
    assert wanted.keys() == found.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def save_constant(path: Path, name: str, array: Array) -> Path:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor)
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=9), path)
    return path


@pytest.mark.parametrize("name", ["bias", "strange"])
def test_a_constant_that_is_no_parameter_is_refused(name: str, tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    before = save_constant(tmp_path / "before.onnx", name, np.full(3, 9, np.float32))
    after = save_constant(tmp_path / "after.onnx", name, np.full(3, 18, np.float32))
    with pytest.raises(QuantizationError, match=f"'{name}' was changed in the graph"):
        with_graph_weights(layer, before, after)


def test_a_square_weight_is_turned_only_where_the_graph_holds_it_turned(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    held = layer.weight.detach().numpy().copy()
    scales = np.array([[1.0], [2.0], [4.0]], np.float32)
    for turned in (held, held.T):
        before = save_constant(tmp_path / "before.onnx", "weight", turned)
        after = save_constant(tmp_path / "after.onnx", "weight", turned * scales)
        changed = with_graph_weights(layer, before, after)
        expected = held * scales if turned is held else (held.T * scales).T
        np.testing.assert_array_equal(changed.get_parameter("weight").numpy(), expected)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), held)


def test_only_the_named_parameters_change() -> None:
    layer = torch.nn.Linear(3, 2)
    changed = with_weights(layer, {"bias": torch.zeros(2)})
    assert torch.equal(changed.get_parameter("weight"), layer.weight)
    assert not changed.get_parameter("bias").any()
    assert not any(parameter.requires_grad for parameter in changed.parameters())
