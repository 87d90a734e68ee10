"""Conversion of a float32 graph to float16 or bfloat16, with casts at the borders.

Which operators may take the narrow type is read from ONNX's own operator definitions, so a node
such as Range, or an input such as the scales of Resize, stays in float32. ONNX Runtime's
converter (`onnxruntime.transformers.float16`) does the same for float16 from a list of names; it
has no bfloat16, clamps weights that do not fit without a message, rounds a weight for all its
readers where one of them asks for float16, and infers shapes through a protobuf, which ends at
2 GB.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)

from mmedge.converters.passes.building import add_initializer
from mmedge.converters.passes.matching import constant, is_op
from mmedge.errors import QuantizationError
from mmedge.specs import Array

__all__ = ["ComputeInFloat32", "NarrowFloats", "narrowed"]

_WIDE = ir.DataType.FLOAT
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895313892515355e38}
_TYPE_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def narrowed(array: Array, dtype: ir.DataType) -> Array:
    """Return float32 numbers in float16 or bfloat16.

    Finite numbers beyond the largest become the largest, infinite ones stay.
    """
    largest = np.float32(_LARGEST[dtype])
    fitting = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
    return fitting.astype(dtype.numpy())


class NarrowFloats(ir.passes.InPlacePass):
    """Compute in float16 or bfloat16 except in the nodes named.

    Requires: operators of ONNX's own domain, or the dtypes of what others make in the graph.
    Ensures: inputs and outputs unchanged in name, dtype and shape. A weight has the narrow type
    where narrow nodes read it, and float32 where others do; no cast is between two float32
    nodes.
    """

    def __init__(self, dtype: ir.DataType, fp32_nodes: Collection[ir.Node] = ()) -> None:
        """Choose the type.

        Args:
            dtype: FLOAT16 or BFLOAT16.
            fp32_nodes: Nodes that stay in float32.
        """
        super().__init__()
        self._dtype = dtype
        self._fp32_nodes = frozenset(fp32_nodes)
        self._casts: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Narrow the main graph; nodes that hold graphs of their own stay in float32.

        Raises:
            QuantizationError: If the dtype of a value is not known; the value is named.
        """
        graph = model.graph
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if any(value.dtype is None for node in graph for value in node.outputs):
            ShapeInferencePass()(model)
        for node in list(graph):
            self._narrow(graph, node)
        for index, value in enumerate(graph.outputs):
            if value.dtype == self._dtype:
                graph.outputs[index] = self._output(value)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _narrow(self, graph: ir.Graph, node: ir.Node) -> None:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name and value.dtype is None and value.uses():
                raise QuantizationError(
                    f"The dtype of '{value.name}' is not known, so the graph cannot be narrowed. "
                    "Narrow the portable layout, whose operators are all ONNX's own."
                )
        takes, makes = self._narrow_places(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_WIDE, self._dtype):
                wanted = self._dtype if index in takes else _WIDE
                if value.dtype != wanted:
                    node.replace_input_with(index, self._cast(graph, value, wanted))
        for index in makes:
            node.outputs[index].type = ir.TensorType(self._dtype)
        if is_op(node, "Cast") and makes:
            node.attributes["to"] = ir.AttrInt64("to", int(self._dtype))

    def _narrow_places(self, node: ir.Node) -> tuple[list[int], list[int]]:
        """Return the inputs and outputs of a node to narrow."""
        floats = (_WIDE, self._dtype)
        takes = [i for i, v in enumerate(node.inputs) if v is not None and v.dtype in floats]
        makes = [i for i, v in enumerate(node.outputs) if v.dtype == _WIDE]
        holds_graph = any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
        # What makes floats of none has their type in an attribute; of those only Cast is rewritten.
        source = makes and not takes and not is_op(node, "Cast")
        if node in self._fp32_nodes or holds_graph or source or node.domain not in ("", "ai.onnx"):
            return [], []
        schema = onnx.defs.get_schema(node.op_type, node.version or 20, "")
        name = _TYPE_NAMES[self._dtype]
        return (
            [i for i in takes if name in schema.inputs[min(i, len(schema.inputs) - 1)].types],
            [i for i in makes if name in schema.outputs[min(i, len(schema.outputs) - 1)].types],
        )

    def _cast(self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value in self._casts:
            return self._casts[value]
        if value.is_initializer():
            made = self._initializer(graph, value)
        else:
            made = _cast_after(graph, value, dtype)
        self._casts[value] = made
        return made

    def _initializer(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        array = constant(value)
        if array is None:
            raise QuantizationError(f"Weight '{value.name}' has no values. Check the source model.")
        name = value.name or ""
        # The narrow weight takes over the name; the wide one is renamed, and dropped if not read.
        graph.initializers.pop(name)
        value.name = f"{name}_float32"
        graph.register_initializer(value)
        return add_initializer(graph, name, narrowed(array, self._dtype))

    def _output(self, value: ir.Value) -> ir.Value:
        name, graph = value.name, value.graph
        if graph is None:
            raise QuantizationError(f"Output '{name}' belongs to no graph.")
        value.name = f"{name}_narrow"
        wide = self._casts.get(value) or _cast_after(graph, value, _WIDE)
        wide.name = name
        wide.shape = value.shape
        wide.metadata_props.update(value.metadata_props)
        return wide


class ComputeInFloat32(ir.passes.InPlacePass):
    """Compute every narrow operator in float32 and round its outputs to the narrow type.

    The same weights and the same roundings of all values between operators, for an engine without
    kernels of the type: ONNX Runtime has hardly any for bfloat16 on a CPU. Sums inside an operator
    are in float32, as tensor cores have them.

    Ensures: inputs and outputs unchanged; external weights are read from where they are.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        """Choose the narrow type, FLOAT16 or BFLOAT16."""
        super().__init__()
        self._dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        graph = model.graph
        wide: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in list(graph):
            if is_op(node, "Cast"):
                continue
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != self._dtype:
                    continue
                if value not in wide:
                    wide[value] = _cast_after(graph, value, _WIDE, "computed")
                node.replace_input_with(index, wide[value])
                modified = True
            for value in node.outputs:
                if value.dtype != self._dtype:
                    continue
                narrow = _cast_after(graph, value, self._dtype, "rounded")
                value.replace_all_uses_with(narrow, replace_graph_outputs=True)
                cast = narrow.producer()
                if cast is not None:
                    cast.replace_input_with(0, value)
                value.name, narrow.name = f"{value.name}_unrounded", value.name
                narrow.metadata_props.update(value.metadata_props)
                value.type = ir.TensorType(_WIDE)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _cast_after(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, suffix: str = "") -> ir.Value:
    """Cast a value at its producer, or at the top of the graph."""
    kind = {_WIDE: "float32", ir.DataType.FLOAT16: "float16"}.get(dtype, "bfloat16")
    name = f"{value.name}_{suffix or kind}"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}_cast")
    cast.outputs[0].name = name
    cast.outputs[0].type = ir.TensorType(dtype)
    cast.outputs[0].shape = value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, cast)
    elif len(graph):
        graph.insert_before(graph[0], cast)
    made: ir.Value = cast.outputs[0]
    return made
