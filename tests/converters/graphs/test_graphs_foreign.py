"""An ONNX file of somebody else cannot bring files of this machine into a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import export_role
from mmedge.errors import BackendError
from mmedge.specs import Axis, TensorSpec


def foreign(path: Path, location: str) -> RoleSpec:
    """A graph x + weights, whose weights lie elsewhere."""
    weights = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[256])
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 256]) for n in "xy")
    node = helper.make_node("Add", ["x", "weights"], ["y"])
    graph = helper.make_graph([node], "foreign", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
    spec = [TensorSpec(name, np.dtype(np.float32), ("batch", 256)) for name in "xy"]
    return RoleSpec(
        module=None,
        inputs=(spec[0],),
        outputs=(spec[1],),
        axes={"batch": Axis(1, 1, 2)},
        sample=lambda sizes, _: {"x": torch.zeros(sizes["batch"], 256)},
        trace_sizes={"batch": 2},
        proof_sizes=(),
        feeds={},
        compare={},
        graph=path,
    )


@pytest.mark.parametrize("link", [False, True], ids=["path", "link"])
def test_weights_elsewhere_are_refused(tmp_path: Path, link: bool) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret! " * 128)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    if link:
        (folder / "weights").symlink_to(secret)
    spec = foreign(folder / "model.onnx", "weights" if link else "../secret")
    with pytest.raises(BackendError, match="leads outside"):
        export_role("module", spec, tmp_path / "out" / "fp32.onnx")
    assert not (tmp_path / "out").exists()


def test_weights_beside_the_model_are_taken(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(np.ones(256, np.float32).tobytes())
    export_role("module", foreign(tmp_path / "model.onnx", "weights"), tmp_path / "out.onnx")
    (kept,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert onnx.numpy_helper.to_array(kept).tolist() == [1.0] * 256
