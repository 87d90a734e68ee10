"""ONNX Runtime's own int4: its MatMulNBitsQuantizer, on graphs that it can take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.passes.building import replace_value
from mmedge.converters.passes.matching import is_op, perm_of, producer

__all__ = ["Peer"]


@dataclass(frozen=True)
class Peer:
    """A contestant of ONNX Runtime's tools.

    Attributes:
        method: "rtn" is the default of its MatMulNBitsQuantizer.
        group_size: Weights that share a scale.
        symmetric: Without zero points.
    """

    method: Literal["rtn", "hqq"]
    group_size: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        """For the table, spelled as our recipes are."""
        parts = ["onnxruntime int4", f"g{self.group_size}"]
        parts += [] if self.method == "rtn" else [self.method]
        return "-".join(parts if self.symmetric else [*parts, "asymmetric"])

    def quantize(self, source: Path, out: Path) -> None:
        """Write the quantized graph of `source`, products by a transposed table among them."""
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            HQQWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        model = ir.load(source)
        _as_products(model)
        proto = ir.to_proto(model)
        onnx.load_external_data_for_model(proto, str(source.parent))
        kinds = ("MatMul", "Gather")
        if self.method == "hqq":
            config = HQQWeightOnlyQuantConfig(
                block_size=self.group_size, bits=4, op_types_to_quantize=("MatMul",)
            )
        else:
            config = DefaultWeightOnlyQuantConfig(
                block_size=self.group_size,
                is_symmetric=self.symmetric,
                accuracy_level=4,
                op_types_to_quantize=kinds,
            )
        quantizer = MatMulNBitsQuantizer(
            proto,
            block_size=self.group_size,
            is_symmetric=self.symmetric,
            accuracy_level=4,
            op_types_to_quantize=kinds,
            algo_config=config,
        )
        quantizer.process()
        onnx.save(
            quantizer.model.model,
            out,
            save_as_external_data=True,
            location=f"{out.name}.data",
            size_threshold=1024,
        )


def _as_products(model: ir.Model) -> None:
    """Write every Gemm as MatMul and Add, and transposed constants as constants."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        turned = None
        if is_op(node, "Gemm") and weight is not None and weight.const_value is not None:
            flipped = node.attributes.get("transB")
            array = weight.const_value.numpy()
            turned = array.T if flipped is not None and flipped.as_int() else array
        elif is_op(node, "MatMul") and (turn := producer(weight, "Transpose")) is not None:
            table = turn.inputs[0]
            if table is not None and table.const_value is not None and perm_of(turn) == (1, 0):
                turned = table.const_value.numpy().T
        if turned is None or weight is None:
            continue
        constant = ir.Value(
            name=f"{node.outputs[0].name}_matrix",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(turned.shape),
            const_value=ir.tensor(np.ascontiguousarray(turned)),
        )
        graph.register_initializer(constant)
        made = ir.node("MatMul", [node.inputs[0], constant], name=f"{node.name}_product")
        made.outputs[0].name = f"{node.outputs[0].name}_product"
        graph.insert_before(node, made)
        result = made.outputs[0]
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
            add = ir.node("Add", [result, node.inputs[2]], name=f"{node.name}_bias")
            add.outputs[0].name = f"{node.outputs[0].name}_bias"
            graph.insert_before(node, add)
            result = add.outputs[0]
        replace_value(node.outputs[0], result)
    RemoveUnusedNodesPass()(model)
