"""Float16: weights and arithmetic in half precision, with ONNX Runtime's converter.

The converter is ONNX Runtime's own (`onnxruntime.transformers.float16`): it knows which operators
have no fp16 kernel and puts the casts around them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.transformers import float16

from mmedge.converters.passes.building import replace_value
from mmedge.converters.passes.matching import is_op, producer

__all__ = ["to_float16"]

# Below this size the converter may infer shapes, which goes through a protobuf of 2 GB at most.
_INFERABLE_BYTES = 1 << 30


def to_float16(model: Path) -> ir.Model:
    """Return a portable fp32 graph in fp16, its inputs and outputs left in float32.

    The final L2 normalization stays in fp32: it squares and sums what may be large.

    Args:
        model: Portable ONNX file.
    """
    graph = ir.load(model)
    kept = _normalization(graph)
    proto = onnx.load(model)
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    converted = float16.convert_float_to_float16(
        proto,
        keep_io_types=True,
        disable_shape_infer=size_bytes > _INFERABLE_BYTES,
        node_block_list=kept,
    )
    half: ir.Model = ir.from_proto(converted)
    _drop_round_trips(half)
    return half


def _normalization(model: ir.Model) -> list[str]:
    """Return the names of ReduceL2 and of everything after it."""
    kept: list[str] = []
    reached: set[ir.Node] = set()
    for node in model.graph:
        if is_op(node, "ReduceL2") or any(
            value is not None and value.producer() in reached for value in node.inputs
        ):
            reached.add(node)
            kept.append(node.name or "")
    return kept


def _drop_round_trips(model: ir.Model) -> None:
    """Remove float32 -> float16 -> float32 between two parts kept in fp32: it only loses bits."""
    graph = model.graph
    for widen in list(graph):
        narrow = producer(widen.inputs[0], "Cast") if is_op(widen, "Cast") else None
        if narrow is None or _target(widen) != ir.DataType.FLOAT:
            continue
        source = narrow.inputs[0]
        if _target(narrow) != ir.DataType.FLOAT16 or source is None:
            continue
        if source.producer() is not None and not source.is_graph_output():
            replace_value(widen.outputs[0], source)
    RemoveUnusedNodesPass()(model)


def _target(cast: ir.Node) -> int:
    return cast.attributes["to"].as_int()
