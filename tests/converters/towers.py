"""Small transformer towers as torch.onnx.export writes them, made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from mmedge.converters.passes.linears import COMPARE_KEY
from mmedge.converters.passes.patch_embedding import PatchEmbeddingAsMatMul
from mmedge.specs import Array, Compare

WIDTH, HEADS, MLP, EMBED = 32, 4, 64, 16
PICTURE, PATCH = 24, 8
VOCABULARY = 3000  # large enough that the embedding table is worth quantizing


class Graph:
    """Collects nodes and initializers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, array: Array | Sequence[int] | float, dtype: str = "float32") -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int, scale: float = 0.2) -> str:
        return self.constant(self.rng.standard_normal(shape) * scale)

    def node(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name, **attributes))
        return name

    def norm(self, x: str) -> str:
        scale = self.constant(1 + 0.1 * self.rng.standard_normal(WIDTH))
        return self.node("LayerNormalization", x, scale, self.weight(WIDTH), axis=-1)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.node("MatMul", x, self.weight(inputs, outputs))
        return self.node("Add", product, self.weight(outputs))

    def heads(self, x: str) -> str:
        shape = self.constant([0, -1, HEADS, WIDTH // HEADS], "int64")
        return self.node("Transpose", self.node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def attention(self, x: str, mask: str | None) -> str:
        query, key, value = (self.heads(self.linear(x, WIDTH, WIDTH)) for _ in range(3))
        root = self.constant((WIDTH // HEADS) ** -0.25)
        # The key's transposition in three dimensions, as the exporter writes it.
        shape = self.node("Shape", key)
        tail = self.node("Slice", shape, self.constant([2], "int64"), self.constant([4], "int64"))
        minus = self.constant([-1], "int64")
        flat = self.node("Reshape", key, self.node("Concat", minus, tail, axis=0))
        turned = self.node("Transpose", flat, perm=[0, 2, 1])
        sequence = self.node(
            "Slice", shape, self.constant([2], "int64"), self.constant([3], "int64")
        )
        back = self.node(
            "Concat",
            self.node("Slice", shape, self.constant([0], "int64"), self.constant([2], "int64")),
            self.constant([WIDTH // HEADS], "int64"),
            sequence,
            axis=0,
        )
        keys = self.node("Reshape", turned, back)
        scores = self.node("MatMul", self.node("Mul", query, root), self.node("Mul", keys, root))
        if mask is not None:
            scores = self.node("Add", scores, mask)
        weights = self.node("Softmax", scores, axis=-1)
        if mask is not None:
            zero = self.constant(0.0)
            weights = self.node("Where", self.node("IsNaN", weights), zero, weights)
        context = self.node("MatMul", weights, value)
        merged = self.node("Transpose", context, perm=[0, 2, 1, 3])
        shape_out = self.constant([0, -1, WIDTH], "int64")
        return self.linear(self.node("Reshape", merged, shape_out), WIDTH, WIDTH)

    def block(self, x: str, mask: str | None) -> str:
        x = self.node("Add", x, self.attention(self.norm(x), mask))
        hidden = self.linear(self.norm(x), WIDTH, MLP)
        gate = self.node("Sigmoid", self.node("Mul", hidden, self.constant(1.702)))
        return self.node("Add", x, self.linear(self.node("Mul", hidden, gate), MLP, WIDTH))

    def embed(self, pooled: str) -> None:
        out = self.node("Gemm", pooled, self.weight(EMBED, WIDTH), transB=1)
        norm = self.node("ReduceL2", out, self.constant([-1], "int64"), keepdims=1)
        self.nodes.append(helper.make_node("Div", [out, norm], ["embeds"], "normalize"))

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto]) -> Path:
        output = helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["batch", EMBED])
        output.metadata_props.add(key=COMPARE_KEY, value=Compare.ROWS.value)
        model = helper.make_model(
            helper.make_graph(self.nodes, "tower", inputs, [output], self.initializers),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)
        onnx.save(
            inferred,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=256,
        )
        return path


def image_tower(path: Path, *, blocks: int = 2, seed: int = 0) -> Path:
    """Write a vision transformer: patches as a product, class token, pooled first token."""
    convolution = convolution_tower(path, blocks=blocks, seed=seed)
    model = ir.load(convolution)
    ir.external_data.load_to_model(model)
    PatchEmbeddingAsMatMul()(model)
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def convolution_tower(path: Path, *, blocks: int = 2, pads: int = 0, seed: int = 0) -> Path:
    """Write a vision transformer as torch exports it, its patches a convolution."""
    graph = Graph(seed)
    kernel = graph.weight(WIDTH, 3, PATCH, PATCH, scale=0.05)
    patches = graph.node(
        "Conv",
        "pixel_values",
        kernel,
        graph.weight(WIDTH),
        kernel_shape=[PATCH, PATCH],
        strides=[PATCH, PATCH],
        pads=[pads] * 4,
    )
    rows = (PICTURE + 2 * pads - PATCH) // PATCH + 1
    flat = graph.node("Reshape", patches, graph.constant([0, WIDTH, rows * rows], "int64"))
    tokens = graph.node("Transpose", flat, perm=[0, 2, 1])
    batch = graph.node("Shape", "pixel_values", start=0, end=1)
    shape = graph.node("Concat", batch, graph.constant([1, WIDTH], "int64"), axis=0)
    first = graph.node("Expand", graph.weight(WIDTH), shape)
    x = graph.node("Concat", first, tokens, axis=1)
    x = graph.node("Add", x, graph.weight(1, rows * rows + 1, WIDTH))
    for _ in range(blocks):
        x = graph.block(x, None)
    graph.embed(graph.norm(graph.node("Gather", x, graph.constant(0, "int64"), axis=1)))
    picture = helper.make_tensor_value_info(
        "pixel_values", TensorProto.FLOAT, ["batch", 3, PICTURE, PICTURE]
    )
    return graph.save(path, [picture])


def text_tower(path: Path, *, blocks: int = 2, seed: int = 1) -> Path:
    """Write a causal text transformer that pools at each text's largest id."""
    graph = Graph(seed)
    x = graph.node("Gather", graph.weight(VOCABULARY, WIDTH), "input_ids", axis=0)
    length = graph.node("Shape", "input_ids", start=1, end=2)
    one_dim = graph.constant([0], "int64")
    steps = graph.node(
        "Range",
        graph.constant(0, "int64"),
        graph.node("Squeeze", length, one_dim),
        graph.constant(1, "int64"),
    )
    columns = graph.node("Unsqueeze", steps, graph.constant([0, 1, 2], "int64"))
    rows = graph.node("Unsqueeze", steps, graph.constant([0, 1, 3], "int64"))
    visible = graph.node("LessOrEqual", columns, rows)
    mask = graph.node("Where", visible, graph.constant(0.0), graph.constant(-np.inf))
    for _ in range(blocks):
        x = graph.block(x, mask)
    x = graph.norm(x)
    end = graph.node("ArgMax", "input_ids", axis=-1, keepdims=0)
    batch = graph.node("Shape", "input_ids", start=0, end=1)
    index = graph.node(
        "Range",
        graph.constant(0, "int64"),
        graph.node("Squeeze", batch, one_dim),
        graph.constant(1, "int64"),
    )
    last = graph.constant([1], "int64")
    pairs = graph.node(
        "Concat", graph.node("Unsqueeze", index, last), graph.node("Unsqueeze", end, last), axis=-1
    )
    graph.embed(graph.node("GatherND", x, pairs))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    return graph.save(path, [ids])


def pictures(batch: int, seed: int = 5) -> dict[str, Array]:
    """Feed of an image tower."""
    shape = (batch, 3, PICTURE, PICTURE)
    return {"pixel_values": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def texts(batch: int, length: int, seed: int = 6) -> dict[str, Array]:
    """Feed of a text tower; each text ends at a place of its own."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY - 1, (batch, length))
    for row, text in enumerate(ids):
        text[max(1, length - 1 - row)] = VOCABULARY - 1
    return {"input_ids": ids}
