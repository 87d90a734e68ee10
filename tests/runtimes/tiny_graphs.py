"""Tiny ONNX graphs for the runtime tests, each written down a second time in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmedge.specs import Array, TensorSpec

WIDTH, DIM = 8, 4
INPUTS = (
    TensorSpec("x", np.dtype(np.float32), ("batch", WIDTH)),
    TensorSpec("gate", np.dtype(np.int64), ("batch",)),
)
OUTPUTS = (
    TensorSpec("y", np.dtype(np.float32), ("batch", DIM)),
    TensorSpec("norm", np.dtype(np.float32), ("batch", 1)),
)
_RANDOM = np.random.default_rng(7)
WEIGHT = _RANDOM.standard_normal((WIDTH, DIM)).astype(np.float32)
BIAS = _RANDOM.standard_normal(DIM).astype(np.float32)


def feed_of(batch: int, seed: int = 0) -> dict[str, Array]:
    """Return a feed of the embedder."""
    random = np.random.default_rng([seed, batch])
    return {
        "x": random.standard_normal((batch, WIDTH)).astype(np.float32),
        "gate": random.integers(1, 5, batch),
    }


def embed(feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return the embedder's outputs."""
    projected = (feed["x"] @ WEIGHT + BIAS) * feed["gate"][:, None].astype(np.float32)
    norm = np.sqrt((projected * projected).sum(axis=1, keepdims=True))
    return {"y": projected / norm, "norm": norm}


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Mapping[str, Array] | None = None,
    *,
    opset: int = 20,
    external: str | None = None,
) -> Path:
    """Write a graph; tensors of 64 bytes or more go to the location `external`, if given."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        list(inputs),
        list(outputs),
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=min(10, onnx.IR_VERSION)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=64)
    return path


def tensor_info(name: str, shape: Sequence[int | str | None], kind: int = TensorProto.FLOAT) -> Any:
    """Return an input or output of a graph."""
    return helper.make_tensor_value_info(name, kind, list(shape))


def save_unary(
    path: Path,
    op: str,
    kind: int = TensorProto.FLOAT,
    shape: Sequence[int | str | None] = ("n",),
    *,
    opset: int = 20,
) -> Path:
    """Write y = op(x)."""
    node = helper.make_node(op, ["x"], ["y"], name="only")
    return save(
        path, [node], [tensor_info("x", shape, kind)], [tensor_info("y", shape, kind)], opset=opset
    )


def save_repeat(path: Path) -> Path:
    """Write y = x repeated `count` times: an output axis that no input names."""
    inputs = [tensor_info("x", [1]), tensor_info("count", [1], TensorProto.INT64)]
    node = helper.make_node("Expand", ["x", "count"], ["y"])
    return save(path, [node], inputs, [tensor_info("y", [None])])


def save_nonzero(path: Path) -> Path:
    """Write the indices of nonzero values: an output whose size depends on values."""
    node = helper.make_node("NonZero", ["x"], ["where"])
    where = tensor_info("where", [1, None], TensorProto.INT64)
    return save(path, [node], [tensor_info("x", ["batch"])], [where])


def save_embedder(path: Path, *, external: str | None = None) -> Path:
    """Write y = L2norm((x @ W + b) * gate), norm beside it: INPUTS to OUTPUTS."""
    return save(
        path,
        [
            helper.make_node("MatMul", ["x", "W"], ["product"], name="project"),
            helper.make_node("Add", ["product", "b"], ["sum"], name="bias"),
            helper.make_node("Cast", ["gate"], ["factor"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["factor", "last"], ["column"], name="unsqueeze"),
            helper.make_node("Mul", ["sum", "column"], ["gated"], name="gating"),
            helper.make_node("ReduceL2", ["gated", "last"], ["norm"], name="length", keepdims=1),
            helper.make_node("Div", ["gated", "norm"], ["y"], name="divide"),
        ],
        [tensor_info("x", ["batch", WIDTH]), tensor_info("gate", ["batch"], TensorProto.INT64)],
        [tensor_info("y", ["batch", DIM]), tensor_info("norm", ["batch", 1])],
        {"W": WEIGHT, "b": BIAS, "last": np.array([1], np.int64)},
        external=external,
    )
