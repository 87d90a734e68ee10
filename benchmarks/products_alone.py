"""Second lower bound, measured: an encoder's int8 matrix products alone.

The first one (int8_floor.py) divides the operations of an encoder by the rate of one large product,
which stays in the caches. A text of 8 tokens cannot come near it: each weight is used eight times
and then gone, so the 38 MB of an encoder's int8 weights are read from memory in every call. This
one runs the products themselves, in their own sizes, each with its own weights.

What is in it: one product for every linear layer that int8 variants hold in int8 (patches, query,
key, value and output projections, both layers of every MLP), with as many rows as that layer has:
in the last block, one for each image or text but in the keys and values. What is not in it: the
projection to the embedding and attention's two products, which are in float; quantization, biases,
activations, norms, softmax, additions, embeddings. Products do not depend on one another, and those
of one size read the same values, so the quantized activations stay in the caches.

In ONNX Runtime a product is MatMulInteger, uint8 by int8 to int32. In OpenVINO it is what its int8
pipeline makes of a linear layer whose input is uint8 already: to float32, with one scale a column.
Weights are -64 to 63. A processor without VNNI adds pairs of products in 16 bits, where
larger ones saturate, and mmedge then asks for slower, exact sums; these are exact either way, so
that the engine takes the fastest kernel it has. With VNNI the range makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import CLIPTextConfig, CLIPVisionConfig

from mmedge.runtimes.ort.engine import load_engine, session_settings
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array

__all__ = ["Product", "alone_in_onnxruntime", "alone_in_openvino", "products"]


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product: (rows, inner) uint8 by (inner, columns) int8."""

    rows: int
    inner: int
    columns: int


def products(
    config: CLIPTextConfig | CLIPVisionConfig,
    kind: Literal["image", "text"],
    batch: int = 1,
    tokens: int = 0,
) -> list[Product]:
    """Return an encoder's int8 products in the order in which it computes them.

    Args:
        config: The tower.
        kind: Which tower it is.
        batch: Images or texts.
        tokens: Of each text; an image has as many as its patches, and one.
    """
    width, inner = int(config.hidden_size), int(config.intermediate_size)
    found: list[Product] = []
    if kind == "image":
        patch, side = int(config.patch_size), int(config.image_size) // int(config.patch_size)
        tokens = side * side + 1
        found.append(Product(batch * side * side, 3 * patch * patch, width))
    blocks = int(config.num_hidden_layers)
    for block in range(blocks):
        every = batch * tokens
        rows = every if block < blocks - 1 else batch  # only the pooled token goes on
        found += [Product(rows, width, width)]
        found += [Product(every, width, width)] * 2
        found += [Product(rows, width, width), Product(rows, width, inner)]
        found += [Product(rows, inner, width)]
    return found


def alone_in_onnxruntime(wanted: list[Product], threads: int) -> Callable[[], object]:
    """Return a runner of the products in ONNX Runtime, with the settings of mmedge's own sessions.

    Args:
        wanted: The products, each with weights of its own.
        threads: Of the engine.
    """
    import onnx

    rng = np.random.default_rng(0)
    codes = _codes(wanted)
    nodes, weights, outputs = [], [], []
    for index, product in enumerate(wanted):
        nodes.append(
            onnx.helper.make_node("MatMulInteger", [_name(product), f"w{index}"], [f"y{index}"])
        )
        weights.append(onnx.numpy_helper.from_array(_weight(product, rng), f"w{index}"))
        outputs.append(
            onnx.helper.make_tensor_value_info(
                f"y{index}", onnx.TensorProto.INT32, [product.rows, product.columns]
            )
        )
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, code.shape)
        for name, code in codes.items()
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "products", inputs, outputs, weights),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    engine = load_engine()
    session = engine.InferenceSession(
        model.SerializeToString(),
        session_settings(engine, SessionOptions(threads=threads), "all"),
        providers=["CPUExecutionProvider"],
    )
    bound = session.io_binding()
    for name, code in codes.items():
        bound.bind_cpu_input(name, code)
    for index, product in enumerate(wanted):
        made = np.empty((product.rows, product.columns), np.int32)
        held = engine.OrtValue.ortvalue_from_numpy(made)
        bound.bind_ortvalue_output(f"y{index}", held)
    return lambda: session.run_with_iobinding(bound)


def alone_in_openvino(wanted: list[Product], threads: int) -> Callable[[], object]:
    """Return a runner of the products in OpenVINO.

    Args:
        wanted: The products, each with weights of its own.
        threads: Of the engine.
    """
    import openvino
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    codes = _codes(wanted)
    inputs, floats = {}, {}
    for name, code in codes.items():
        inputs[name] = ops.parameter(code.shape, np.uint8, name)
        floats[name] = ops.multiply(ops.convert(inputs[name], np.float32), np.float32(0.01))
    outputs = []
    for product in wanted:
        weight = ops.constant(_weight(product, rng).T.copy())
        scales = np.full((product.columns, 1), 0.01, np.float32)
        scaled = ops.multiply(ops.convert(weight, np.float32), scales)
        outputs.append(ops.matmul(floats[_name(product)], scaled, False, True))
    compiled = openvino.Core().compile_model(
        openvino.Model(outputs, list(inputs.values())),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    for index, name in enumerate(inputs):
        request.set_input_tensor(index, openvino.Tensor(codes[name]))

    def run() -> None:
        request.infer()

    return run


def _name(product: Product) -> str:
    """Return the name of the input that a product reads."""
    return f"x_{product.rows}_{product.inner}"


def _codes(wanted: list[Product]) -> dict[str, Array]:
    """Return uint8 inputs of every size, by name."""
    rng = np.random.default_rng(1)
    return {
        _name(one): rng.integers(0, 256, (one.rows, one.inner)).astype(np.uint8) for one in wanted
    }


def _weight(product: Product, rng: np.random.Generator) -> Array:
    """Return int8 weights (inner, columns) that cannot make a 16-bit sum saturate."""
    return rng.integers(-64, 64, (product.inner, product.columns)).astype(np.int8)
