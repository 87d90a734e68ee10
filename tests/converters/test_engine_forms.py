"""Every method's graph opens and runs in ONNX Runtime; those for engines have TensorRT's form.

What the form is was found by building with TensorRT-RTX 1.7 (docs/quantization.md, "For engines").
A new recipe joins by one line in RECIPES, and in ENGINES where it is for engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from towers import image_tower, images, text_tower, texts

from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.methods.recipes import METHODS, parse_recipe
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.bfloat16 import emulate_bfloat16
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.quantization.quantize import quantize
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array, Precision

# Settings that engines are built from: (name, smallest cosine to float32).
ENGINES = {
    "fp16": 0.9999,
    "bf16": 0.999,
    "fp8-half": 0.98,
    "int8-static-symmetric": 0.98,
    "int8-static-symmetric-half": 0.98,
    "int8-static-mse-symmetric-equalized-corrected-half": 0.98,
    "int4-g16-blocked": 0.95,
    "int4-g16-blocked-half": 0.95,
}
RECIPES = ENGINES | {
    "fp8": 0.98,
    "int8-dynamic": 0.99,
    "int8-dynamic-equalized": 0.99,
    "int8-static": 0.99,
    "int8-static-percentile-corrected": 0.98,
    "int8-weight": 0.999,
    "int8-weight-g16-blocked": 0.999,
    "int4": 0.95,
    "int4-g16-hqq": 0.95,
    "int4-g16-gptq-asymmetric": 0.95,
}
QUANTIZED_TYPES = {
    Precision.INT8: ir.DataType.INT8,
    Precision.FP8: ir.DataType.FLOAT8E4M3FN,
    Precision.INT4: ir.DataType.INT4,
}
TOWERS: dict[str, tuple[Callable[[Path], Path], Callable[[int], dict[str, Array]]]] = {
    "image": (image_tower, lambda seed: images(3, seed)),
    "text": (text_tower, lambda seed: texts(3, 9, seed)),
}


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def make(name: str, kind: str, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write what a recipe makes of a tower: the fp32 graph and the quantized ones by layout."""
    portable = TOWERS[kind][0](folder / "fp32.onnx")
    layouts = {"portable": portable, "onnxruntime": folder / "fp32.onnxruntime.onnx"}
    to_onnxruntime_layout(portable, layouts["onnxruntime"])

    def feeds() -> Iterator[dict[str, Array]]:
        return (TOWERS[kind][1](seed) for seed in range(100, 104))

    made: dict[str, Path] = {}
    for layout, method in parse_recipe(name).methods.items():
        made[layout] = folder / f"{layout}.onnx"
        quantize(layouts[layout], made[layout], method, calibration=feeds)
    return portable, made


def test_every_method_is_tried() -> None:
    tried = {method for method in METHODS for name in RECIPES if name.startswith(method)}
    assert tried == {*METHODS} - {"fp32"}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_opens_and_runs_in_onnxruntime(name: str, kind: str, tmp_path: Path) -> None:
    portable, made = make(name, kind, tmp_path)
    feed = TOWERS[kind][1](1)
    for path in made.values():
        if name == "bf16":  # no kernels on a CPU
            ir.save(emulate_bfloat16(path), path)
        cosine = (run(path, feed) * run(portable, feed)).sum(axis=1)
        assert cosine.min() > RECIPES[name]


def initializer_readers(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Node]]:
    for value in model.graph.initializers.values():
        for node in value.consumers():
            yield value, node


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", ENGINES)
def test_engines_get_the_form_that_tensorrt_takes(name: str, kind: str, tmp_path: Path) -> None:
    portable, made = make(name, kind, tmp_path)
    assert list(made) == ["portable"]
    onnx.checker.check_model(made["portable"], full_check=True)
    model = ir.load(made["portable"])
    recipe = parse_recipe(name)
    # At opset 23 the exporter's Attention would come; int4 needs 21.
    opset = 21 if recipe.precision is Precision.INT4 else 20
    assert dict(model.graph.opset_imports) == {"": opset}
    assert {node.domain for node in model.graph} == {""}
    assert all(value.dtype == ir.DataType.FLOAT for value in model.graph.outputs)

    code = QUANTIZED_TYPES.get(recipe.precision)
    types = (*QUANTIZED_TYPES.values(), ir.DataType.UINT8, ir.DataType.UINT4)
    read = [(v, n) for v, n in initializer_readers(model) if v.dtype in types]
    for value, node in read:
        assert value.dtype == code, value.name
        # "Quantized constant is only allowed before DQ", and zero points, which are zero.
        if node.inputs[0] is value:
            assert node.op_type == "DequantizeLinear", value.name
        else:
            assert node.inputs[2] is value
            assert not np.asarray(value.const_value.numpy(), np.float32).any()
    quantized = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            # Of a product with a constant, or of a table; nothing else is quantized.
            assert {reader.op_type for reader in node.outputs[0].consumers()} <= {
                "MatMul",
                "Gather",
            }
    for node in quantized:
        assert node.inputs[2].dtype == code
        assert {r.op_type for r in node.outputs[0].consumers()} == {"DequantizeLinear"}
    if code is None:
        assert not read
        return
    products = [
        node for node in model.graph if node.op_type == "MatMul" and by_quantized_values(node)
    ]
    assert len(products) == len(find_linears(ir.load(portable).graph)) - 1
    for node in products:
        weight = node.inputs[1].producer()
        if recipe.precision is Precision.INT8:
            assert weight.inputs[1].shape == [weight.inputs[0].shape[1]]  # a scale a column
        if recipe.precision is Precision.INT4:
            assert weight.inputs[1].shape[0] > 1  # one block would be folded to float
        else:
            assert node.inputs[0].producer().op_type == "DequantizeLinear"
    half = "half" in name
    scales = {node.inputs[1].producer().inputs[1].dtype for node in products}
    assert scales == {ir.DataType.FLOAT16 if half else ir.DataType.FLOAT}  # so is the product
    if half:
        wide = {n.op_type for n in model.graph if ir.DataType.FLOAT in {v.dtype for v in n.outputs}}
        assert wide <= {"Cast", "ReduceL2", "Div"}  # the normalization of the output


def by_quantized_values(product: ir.Node) -> bool:
    weight = product.inputs[1]
    made = None if weight is None else weight.producer()
    return made is not None and made.op_type == "DequantizeLinear"


@pytest.mark.parametrize(("activations", "lookup"), [("uint8", "quantized"), ("int8", "floats")])
def test_where_a_cpu_looks_up_quantized_rows_an_engine_gets_a_dequantized_table(
    activations: str, lookup: str, tmp_path: Path
) -> None:
    source, out = text_tower(tmp_path / "text.onnx"), tmp_path / "int8.onnx"
    config = StaticInt8(form="qdq", activations=activations)  # type: ignore[arg-type]
    quantize(source, out, config, calibration=lambda: iter([texts(3, 9)]))
    graph = ir.load(out).graph
    table = next(v for n, v in graph.initializers.items() if v.shape == [3000, 32])
    assert table.dtype == ir.DataType.INT8
    (reader,) = table.consumers()
    if lookup == "quantized":
        assert reader.op_type == "Gather"  # not all rows in each call
        return
    assert reader.op_type == "DequantizeLinear"
    assert reader.attributes["axis"].as_int() == 0
    assert {node.op_type for node in reader.outputs[0].consumers()} == {"Gather"}
