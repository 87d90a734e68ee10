"""NaN and infinity are named where they arise, in modules, in graphs and in a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from roles import role, role_inputs
from torch import nn

from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import export_role
from mmedge.converters.graphs.nan_trace import first_nan, first_nan_module
from mmedge.converters.graphs.parity import probe_role
from mmedge.converters.methods.recipes import FP32
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.variants.builder import VariantBuilder
from mmedge.errors import ExportError, ParityError
from mmedge.specs import TensorSpec


class Tower(nn.Module):
    """x (B, 4) -> the direction of its projection, which an image of zeros has none of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)
        with torch.no_grad():
            self.first.bias.zero_()
            self.second.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)


def spec_of(module: nn.Module) -> RoleSpec:
    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(sizes["batch"], 4, generator=torch.Generator().manual_seed(seed))}

    return role(
        module,
        (TensorSpec("x", np.dtype("float32"), ("batch", 4)),),
        (TensorSpec("y", np.dtype("float32"), ("batch", 3)),),
        sample,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    tower = Tower()
    with torch.no_grad():
        tower.second.bias[1] = value
    with pytest.raises(ExportError, match=r"itself gives .* first in 'second', whose bias holds"):
        probe_role(spec_of(tower))


def test_an_overflow_is_named_where_it_happens() -> None:
    tower = Tower()
    with torch.no_grad():
        tower.first.weight *= 1e30
        tower.second.weight *= 1e30
    assert first_nan_module(tower, [torch.ones(1, 4)]) == "'second'"


def test_no_submodule_is_blamed_for_ops_between_them() -> None:
    assert first_nan_module(Tower(), [torch.zeros(1, 4)]) == "its output"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tower") / "fp32.onnx"
    torch.manual_seed(0)
    with quiet_libraries():
        export_role("tower", spec_of(Tower()), out)
    return out


def test_the_first_nan_of_a_graph_is_named(exported: Path) -> None:
    assert first_nan(exported, {"x": np.ones((1, 4), np.float32)}) is None
    assert first_nan(exported, {"x": np.zeros((1, 4), np.float32)}) == "y"


def test_evaluation_data_without_fp32_outputs_is_an_error(exported: Path) -> None:
    torch.manual_seed(0)
    rows = np.ones((4, 4), np.float32)
    rows[2] = 0
    spec = spec_of(Tower())
    golden = {"x": np.ones((1, 4), np.float32)}
    inputs = role_inputs(spec, {"x": rows}, golden, probe_role(spec))
    models = {"portable": exported}
    builder = VariantBuilder("tower", exported.parent, models, spec, inputs, None)
    expected = r"^tower/fp32: .* 1 of 4 rows .* first for sample 3, from activation 'y' on"
    with pytest.raises(ParityError, match=expected):
        builder.build(FP32)
    builder.close()
