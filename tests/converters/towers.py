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
IMAGE, PATCH = 24, 8
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

    def rms_norm(self, x: str, epsilon: float = 1e-5) -> str:
        """Return RMS normalization as torch writes it."""
        square = self.node("Pow", x, self.constant(2.0))
        mean = self.node("ReduceMean", square, self.constant([-1], "int64"), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.constant(epsilon)))
        scaled = self.node("Mul", x, self.node("Reciprocal", root))
        return self.node("Mul", self.weight(WIDTH), scaled)

    def norm(self, x: str) -> str:
        scale = self.constant(1 + 0.1 * self.rng.standard_normal(WIDTH))
        return self.node("LayerNormalization", x, scale, self.weight(WIDTH), axis=-1)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.node("MatMul", x, self.weight(inputs, outputs))
        return self.node("Add", product, self.weight(outputs))

    def heads(self, x: str, count: int = HEADS) -> str:
        shape = self.constant([0, -1, count, WIDTH // HEADS], "int64")
        return self.node("Transpose", self.node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def repeat(self, x: str, count: int) -> str:
        """Heads (B, count, L, d) -> (B, HEADS, L, d), each as often as queries share it."""
        wide = self.node("Unsqueeze", x, self.constant([2], "int64"))
        shape = self.constant([1, 1, HEADS // count, 1, 1], "int64")
        merged = self.constant([0, HEADS, -1, WIDTH // HEADS], "int64")
        return self.node("Reshape", self.node("Expand", wide, shape), merged)

    def attention(
        self,
        x: str,
        mask: str | None,
        *,
        cache: str = "",
        kv_heads: int = HEADS,
        turn: bool = False,
    ) -> str:
        """Attention; `cache` is the layer whose past it joins, `turn` stands for positions."""
        query = self.heads(self.linear(x, WIDTH, WIDTH))
        width = kv_heads * (WIDTH // HEADS)
        key, value = (self.heads(self.linear(x, WIDTH, width), kv_heads) for _ in range(2))
        if turn:
            factors = self.weight(WIDTH // HEADS, scale=1.0)
            query, key = self.node("Mul", query, factors), self.node("Mul", key, factors)
        if cache:
            for part, new in (("key", key), ("value", value)):
                names = f"past.{cache}.{part}", f"present.{cache}.{part}"
                self.nodes.append(
                    helper.make_node("Concat", [names[0], new], [names[1]], names[1], axis=2)
                )
            key, value = f"present.{cache}.key", f"present.{cache}.value"
        if kv_heads != HEADS:
            key, value = self.repeat(key, kv_heads), self.repeat(value, kv_heads)
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

    def block(
        self,
        x: str,
        mask: str | None,
        *,
        cache: str = "",
        kv_heads: int = HEADS,
        turn: bool = False,
    ) -> str:
        mixed = self.attention(self.norm(x), mask, cache=cache, kv_heads=kv_heads, turn=turn)
        x = self.node("Add", x, mixed)
        hidden = self.linear(self.norm(x), WIDTH, MLP)
        gate = self.node("Sigmoid", self.node("Mul", hidden, self.constant(1.702)))
        return self.node("Add", x, self.linear(self.node("Mul", hidden, gate), MLP, WIDTH))

    def embed(self, pooled: str) -> None:
        out = self.node("Gemm", pooled, self.weight(EMBED, WIDTH), transB=1)
        norm = self.node("ReduceL2", out, self.constant([-1], "int64"), keepdims=1)
        self.nodes.append(helper.make_node("Div", [out, norm], ["embeds"], "normalize"))

    def save(
        self,
        path: Path,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto] | None = None,
    ) -> Path:
        if outputs is None:
            embeds = helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["batch", EMBED])
            embeds.metadata_props.add(key=COMPARE_KEY, value=Compare.ROWS.value)
            outputs = [embeds]
        model = helper.make_model(
            helper.make_graph(self.nodes, "tower", inputs, outputs, self.initializers),
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
    rows = (IMAGE + 2 * pads - PATCH) // PATCH + 1
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
    image = helper.make_tensor_value_info(
        "pixel_values", TensorProto.FLOAT, ["batch", 3, IMAGE, IMAGE]
    )
    return graph.save(path, [image])


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


def decoder_tower(
    path: Path, *, blocks: int = 2, kv_heads: int = HEADS, turn: bool = False, seed: int = 2
) -> Path:
    """Write a causal decoder over a past, its mask from `attention_mask`, its head its table."""
    graph = Graph(seed)
    table = graph.weight(VOCABULARY, WIDTH)
    x = graph.node("Gather", table, "input_ids", axis=0)
    zero, one = graph.constant(0, "int64"), graph.constant(1, "int64")
    total, new = (
        graph.node(
            "Squeeze", graph.node("Shape", name, start=1, end=2), graph.constant([0], "int64")
        )
        for name in ("attention_mask", "input_ids")
    )
    columns = graph.node("Range", zero, total, one)
    rows = graph.node("Range", graph.node("Sub", total, new), total, one)
    rows = graph.node("Unsqueeze", rows, graph.constant([1], "int64"))
    seen = graph.node("Greater", "attention_mask", zero)
    seen = graph.node("Unsqueeze", seen, graph.constant([1, 2], "int64"))
    shown = graph.node("Or", seen, graph.node("Equal", columns, rows))
    visible = graph.node("And", shown, graph.node("LessOrEqual", columns, rows))
    mask = graph.node("Where", visible, graph.constant(0.0), graph.constant(-np.inf))
    for layer in range(blocks):
        x = graph.block(x, mask, cache=str(layer), kv_heads=kv_heads, turn=turn)
    turned = graph.node("Transpose", table, perm=[1, 0])
    normed = graph.rms_norm(x) if turn else graph.norm(x)
    graph.nodes.append(helper.make_node("MatMul", [normed, turned], ["logits"], "head"))
    names = [f"{layer}.{part}" for layer in range(blocks) for part in ("key", "value")]
    size = WIDTH // HEADS
    total_name = "past + sequence"
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", total_name]),
    ] + [
        helper.make_tensor_value_info(
            f"past.{name}", TensorProto.FLOAT, ["batch", kv_heads, "past", size]
        )
        for name in names
    ]
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]
    )
    logits.metadata_props.add(key=COMPARE_KEY, value=Compare.TOKENS.value)
    presents = [
        helper.make_tensor_value_info(
            f"present.{name}", TensorProto.FLOAT, ["batch", kv_heads, total_name, size]
        )
        for name in names
    ]
    return graph.save(path, inputs, [logits, *presents])


def grouped_tower(path: Path, *, blocks: int = 2) -> Path:
    """Write a decoder with shared heads of keys and values, turned queries and an RMS norm."""
    return decoder_tower(path, blocks=blocks, kv_heads=2, turn=True)


def continued(
    batch: int, length: int, past: int, *, kv_heads: int = HEADS, blocks: int = 2, seed: int = 7
) -> dict[str, Array]:
    """Feed of a decoder; each text is padded by one more on the left than the one before."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, past + length), np.int64)
    for row in range(batch):
        mask[row, : min(row, past + length - 1)] = 0
    shape = (batch, kv_heads, past, WIDTH // HEADS)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (batch, length)),
        "attention_mask": mask,
        **{
            f"past.{layer}.{part}": rng.standard_normal(shape).astype(np.float32)
            for layer in range(blocks)
            for part in ("key", "value")
        },
    }


def images(batch: int, seed: int = 5) -> dict[str, Array]:
    """Feed of an image tower."""
    shape = (batch, 3, IMAGE, IMAGE)
    return {"pixel_values": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def texts(batch: int, length: int, seed: int = 6) -> dict[str, Array]:
    """Feed of a text tower; each text ends at a place of its own."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY - 1, (batch, length))
    for row, text in enumerate(ids):
        text[max(1, length - 1 - row)] = VOCABULARY - 1
    return {"input_ids": ids}


def convolution_network(path: Path, *, norm: str = "affine", seed: int = 3) -> Path:
    """Write a convolutional encoder: stem, residual block, depthwise and gated block, mean.

    Args:
        path: ONNX file to write.
        norm: After a convolution: "affine" (Mul and Add, as of a frozen batch norm), "batch"
            (BatchNormalization) or "none".
        seed: Of the weights.
    """
    graph = Graph(seed)

    def convolve(
        x: str, inputs: int, outputs: int, size: int, *, relu: bool = True, **attributes: object
    ) -> str:
        wide = 1.4 / (inputs * size * size) ** 0.5
        kernel = graph.weight(outputs, inputs, size, size, scale=wide)
        y = graph.node(
            "Conv", x, kernel, kernel_shape=[size, size], pads=[size // 2] * 4, **attributes
        )
        factor = 1 + 0.2 * graph.rng.standard_normal(outputs)
        shift, mean = 0.1 * graph.rng.standard_normal((2, outputs))
        if norm == "affine":
            by_channel = (1, outputs, 1, 1)
            y = graph.node("Mul", y, graph.constant(factor.reshape(by_channel)))
            y = graph.node("Add", graph.constant(shift.reshape(by_channel)), y)
        elif norm == "batch":
            statistics = (factor, shift, mean, np.full(outputs, 0.8))
            y = graph.node("BatchNormalization", y, *map(graph.constant, statistics), epsilon=1e-3)
        return graph.node("Relu", y) if relu else y

    def silu(x: str) -> str:
        return graph.node("Mul", x, graph.node("Sigmoid", x))

    x = convolve("pixel_values", 3, 16, 3, strides=[2, 2])
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    narrow = convolve(convolve(x, 16, 8, 1), 8, 8, 3)
    x = graph.node("Relu", graph.node("Add", convolve(narrow, 8, 16, 1, relu=False), x))
    wide = silu(convolve(x, 16, 24, 1, relu=False))
    wide = silu(convolve(wide, 1, 24, 3, relu=False, group=24))
    axes = graph.constant([2, 3], "int64")
    gate = convolve(graph.node("ReduceMean", wide, axes, keepdims=1), 24, 24, 1, relu=False)
    wide = graph.node("Mul", wide, graph.node("Sigmoid", gate))
    x = graph.node("Add", convolve(wide, 24, 16, 1, relu=False), x)
    x = convolve(x, 16, WIDTH, 1)
    graph.embed(graph.node("ReduceMean", x, axes, keepdims=0))
    image = helper.make_tensor_value_info(
        "pixel_values", TensorProto.FLOAT, ["batch", 3, IMAGE, IMAGE]
    )
    return graph.save(path, [image])
