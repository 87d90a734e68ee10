"""First int8 lower bound, computed: an encoder's operations at the rate of one large product.

The product is 512 x 3072 by 3072 x 768, which stays in the caches, so weights come at no cost. Few
rows, as a short text has, cannot reach that rate: products_alone.py measures what they can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from transformers import CLIPTextConfig, CLIPVisionConfig

__all__ = ["int8_rate", "operations"]

# Large enough that loading and starting vanish, small enough that it stays in the caches.
_ROWS, _INNER, _COLUMNS = 512, 3072, 768
_ROUNDS = 40


def operations(
    config: CLIPTextConfig | CLIPVisionConfig, kind: Literal["image", "text"], tokens: int = 0
) -> float:
    """Return the multiplications and additions of one image's or text's matrix products.

    After the last block's keys and values only the pooled token is counted: the output needs no
    other. Attention's products are counted; embeddings, norms and softmax are not.

    Args:
        config: The tower.
        kind: Which tower it is.
        tokens: Of the text; an image has as many as its patches, and one.
    """
    width, inner = int(config.hidden_size), int(config.intermediate_size)
    patches = 0.0
    if kind == "image":
        side = int(config.image_size) // int(config.patch_size)
        tokens = side * side + 1
        patches = 2.0 * side * side * 3 * int(config.patch_size) ** 2 * width

    def block(rows: int) -> float:
        """A block of which `rows` tokens go through everything but keys and values."""
        linear = 2 * rows * width * width + 2 * rows * width * inner
        keys_values = 2 * tokens * width * width
        attention = 2 * rows * tokens * width
        return 2.0 * (linear + keys_values + attention)

    head = 2.0 * width * int(config.projection_dim)
    return patches + (int(config.num_hidden_layers) - 1) * block(tokens) + block(1) + head


def int8_rate() -> dict[str, float]:
    """Return operations a second of a large int8 product on one thread, by engine.

    Of the least processor time, which is that of an idle machine on a busy one.
    """
    rates = {}
    for name, call in (("onnxruntime", _onnxruntime()), ("openvino", _openvino())):
        call()
        best_s = np.inf
        for _ in range(_ROUNDS):
            started = time.process_time()
            call()
            best_s = min(best_s, time.process_time() - started)
        rates[name] = 2.0 * _ROWS * _INNER * _COLUMNS / best_s
    return rates


def _onnxruntime() -> Callable[[], object]:
    import onnx
    import onnxruntime

    codes = np.random.default_rng(0).integers(-127, 128, (_INNER, _COLUMNS)).astype(np.int8)
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [_ROWS, _INNER])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [_ROWS, _COLUMNS])],
        [onnx.numpy_helper.from_array(codes, "w")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).integers(0, 256, (_ROWS, _INNER)).astype(np.uint8)
    return lambda: session.run(None, {"x": x})


def _openvino() -> Callable[[], object]:
    """A linear layer in int8 as OpenVINO runs it; its quantization of x is in the time."""
    import openvino
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    x = ops.parameter([_ROWS, _INNER], np.float32)
    codes = ops.fake_quantize(
        x, np.float32(0), np.float32(2.55), np.float32(0), np.float32(2.55), 256
    )
    weight = ops.constant(rng.integers(-127, 128, (_COLUMNS, _INNER)).astype(np.int8))
    scaled = ops.multiply(ops.convert(weight, np.float32), np.full((_COLUMNS, 1), 0.01, np.float32))
    model = openvino.Model([ops.matmul(codes, scaled, False, True)], [x])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    feed = rng.random((_ROWS, _INNER), np.float32)
    return lambda: request.infer({0: feed}, share_inputs=True)
