"""Small graphs of the kinds that engines are built from, made without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmedge.specs import Array

WIDTH, HEADS, VOCABULARY = 32, 4, 64
HEAD = WIDTH // HEADS
FLOATS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}

Shapes = Mapping[str, Sequence[int | str]]


class Net:
    """Collects nodes and initializers of one float type."""

    def __init__(self, dtype: str = "float32", seed: int = 0, *, opset: int = 20) -> None:
        self.dtype = np.dtype(dtype)
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, value: object, dtype: object = None) -> str:
        name = f"c{len(self.initializers)}"
        array = np.asarray(value, self.dtype if dtype is None else dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape) * 0.2)

    def node(self, op_type: str, *inputs: str, out: str = "", **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        made = out or name
        self.nodes.append(helper.make_node(op_type, list(inputs), [made], name, **attributes))
        return made

    def linear(self, x: str, inputs: int, outputs: int, out: str = "") -> str:
        product = self.node("MatMul", x, self.weight(inputs, outputs))
        return self.node("Add", product, self.weight(outputs), out=out)

    def heads(self, x: str) -> str:
        shape = self.constant([0, -1, HEADS, HEAD], np.int64)
        return self.node("Transpose", self.node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def attend(self, query: str, key: str, value: str, mask: str | None = None) -> str:
        """Attention over (B, heads, T, head) tensors, back to (B, T, width)."""
        turned = self.node("Transpose", key, perm=[0, 1, 3, 2])
        scaled = self.node("Mul", query, self.constant(HEAD**-0.5))
        scores = self.node("MatMul", scaled, turned)
        if mask is not None:
            scores = self.node("Add", scores, mask)
        context = self.node("MatMul", self.node("Softmax", scores, axis=-1), value)
        merged = self.node("Transpose", context, perm=[0, 2, 1, 3])
        return self.node("Reshape", merged, self.constant([0, -1, WIDTH], np.int64))

    def norm(self, x: str) -> str:
        return self.node("LayerNormalization", x, self.weight(WIDTH), self.weight(WIDTH), axis=-1)

    def save(self, path: Path, inputs: Shapes, outputs: Shapes, *, ids: Sequence[str] = ()) -> Path:
        """Write the graph; the inputs in `ids` are int64, everything else is of the net's type."""
        kind = FLOATS[self.dtype]

        def info(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(
                name, TensorProto.INT64 if name in ids else kind, list(shape)
            )

        graph = helper.make_graph(
            self.nodes,
            "net",
            [info(*pair) for pair in inputs.items()],
            [info(*pair) for pair in outputs.items()],
            self.initializers,
        )
        opset = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def fake_quantized(net: Net, x: str, scale: float) -> str:
    """Put QuantizeLinear and DequantizeLinear in int8 after a tensor."""
    step, zero = net.constant(scale), net.constant(0, np.int8)
    return net.node("DequantizeLinear", net.node("QuantizeLinear", x, step, zero), step, zero)


def dequantized_kernel(net: Net, *shape: int) -> str:
    """Return an int8 kernel with a scale for each of its output channels, dequantized."""
    quantized = net.constant(net.rng.integers(-127, 128, shape), np.int8)
    scales = net.constant(np.full(shape[0], 0.01))
    return net.node("DequantizeLinear", quantized, scales, axis=0)


def convolutional_net(path: Path, *, quantized: bool) -> Path:
    """Write two convolutions with a residual around the second, and a linear head.

    Args:
        path: Where to write it.
        quantized: Q/DQ around every convolution.
    """
    net = Net("float16" if quantized else "float32")
    x = "image"
    for index, (taken, made, stride) in enumerate([(3, 16, 2), (16, 16, 1)]):
        entry = fake_quantized(net, x, 0.05) if quantized else x
        shape = (made, taken, 3, 3)
        kernel = dequantized_kernel(net, *shape) if quantized else net.weight(*shape)
        y = net.node("Conv", entry, kernel, net.weight(made), strides=[stride] * 2, pads=[1] * 4)
        x = net.node("Relu", net.node("Add", y, x) if index else y)
    pooled = net.node("Flatten", net.node("GlobalAveragePool", x), axis=1)
    net.linear(pooled, 16, 8, out="features")
    return net.save(path, {"image": ("batch", 3, 32, 32)}, {"features": ("batch", 8)})


def decoder_step(path: Path, *, layers: int = 2) -> Path:
    """Write a step of a decoder: new tokens and the past's keys and values, to logits and more."""
    net = Net("float16")
    x = net.node("Gather", net.weight(VOCABULARY, WIDTH), "input_ids", axis=0)
    inputs: dict[str, Sequence[int | str]] = {
        "input_ids": ("batch", "sequence"),
        "mask": ("batch", 1, "sequence", "total"),
    }
    outputs: dict[str, Sequence[int | str]] = {"logits": ("batch", "sequence", VOCABULARY)}
    for layer in range(layers):
        entry = net.norm(x)
        query, key, value = (net.heads(net.linear(entry, WIDTH, WIDTH)) for _ in range(3))
        grown = []
        for what, new in (("key", key), ("value", value)):
            past, present = f"past.{layer}.{what}", f"present.{layer}.{what}"
            inputs[past] = ("batch", HEADS, "past", HEAD)
            outputs[present] = ("batch", HEADS, "total", HEAD)
            grown.append(net.node("Concat", past, new, out=present, axis=2))
        attended = net.attend(query, *grown, mask="mask")
        x = net.node("Add", x, net.linear(attended, WIDTH, WIDTH))
        hidden = net.linear(net.norm(x), WIDTH, 2 * WIDTH)
        gate = net.node("Mul", hidden, net.node("Sigmoid", hidden))
        x = net.node("Add", x, net.linear(gate, 2 * WIDTH, WIDTH))
    net.node("MatMul", net.norm(x), net.weight(WIDTH, VOCABULARY), out="logits")
    return net.save(path, inputs, outputs, ids=["input_ids"])


def fusion_head(path: Path, *, dtype: str = "float16") -> Path:
    """Write a head that fuses two towers: text tokens attend to patches, behind a gate."""
    net = Net(dtype)
    query = net.heads(net.linear(net.norm("tokens"), WIDTH, WIDTH))
    key, value = (net.heads(net.linear("patches", WIDTH, WIDTH)) for _ in range(2))
    fused = net.linear(net.attend(query, key, value), WIDTH, WIDTH)
    gate = net.node("Tanh", net.constant([0.5]))
    x = net.node("Add", "tokens", net.node("Mul", fused, gate))
    axes = net.constant([1], np.int64)
    pooled = net.node("ReduceMean", net.norm(x), axes, keepdims=0)
    net.linear(pooled, WIDTH, 10, out="logits")
    return net.save(
        path,
        {"tokens": ("batch", "sequence", WIDTH), "patches": ("batch", "patches", WIDTH)},
        {"logits": ("batch", 10)},
    )


def linear_graph(path: Path, weight: Array | None = None, *, external: bool = False) -> Path:
    """Write y = x @ W, with W beside the file where asked."""
    net = Net()
    name = net.weight(16, 8) if weight is None else net.constant(weight)
    net.node("MatMul", "x", name, out="y")
    net.save(path, {"x": ("batch", 16)}, {"y": ("batch", 8)})
    if external:
        model = onnx.load(path)
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
        )
    return path
