"""Attention over a past in one node, and graphs that only look like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from towers import HEADS, WIDTH, continued, decoder_tower, grouped_tower

from mmedge.converters.passes.attention import FuseAttention
from mmedge.converters.passes.building import add_initializer
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array, Axis

OPTIONS = SessionOptions(axes={"past": Axis(0, 4, 16)})
TOWERS = {"decoder": (decoder_tower, HEADS), "grouped": (grouped_tower, 2)}


def fuse(source: Path) -> tuple[ir.Model, Path]:
    model = ir.load(source)
    FuseAttention()(model)
    ir.save(model, source.with_name("fused.onnx"))
    return model, source.with_name("fused.onnx")


def counted(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: Path, feed: dict[str, Array]) -> dict[str, Array]:
    with open_session(model, options=OPTIONS) as session:
        return session.run(feed)


@pytest.mark.parametrize("name", TOWERS)
def test_a_past_is_joined_by_the_node(name: str, tmp_path: Path) -> None:
    model, path = fuse(TOWERS[name][0](tmp_path / "given.onnx"))
    operators = counted(model)
    assert operators["Attention"] == 2
    for gone in ("Softmax", "IsNaN", "Concat", "Expand"):
        assert operators[gone] == 0
    attention = [node for node in model.graph if node.op_type == "Attention"]
    joined = [value.name for node in attention for value in node.outputs[1:]]
    assert joined == [output.name for output in model.graph.outputs[1:]]
    # Heads that are split at once stay side by side, those that are turned first do not.
    assert {len(node.inputs[0].shape or ()) for node in attention if node.inputs[0]} == {
        3 if name == "decoder" else 4
    }
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_gives_the_same_tokens(name: str, batch: int, tmp_path: Path) -> None:
    make, heads = TOWERS[name]
    source = make(tmp_path / "given.onnx")
    _model, path = fuse(source)
    prompt = continued(batch, 5, 0, kv_heads=heads)
    tokens, logits = [], []
    for graph in (source, path):
        feed, row = dict(prompt), []
        with open_session(graph, options=OPTIONS) as session:
            for _ in range(6):
                outputs = session.run(feed)
                row.append(outputs["logits"][:, -1].argmax(axis=-1))
                logits.append(outputs["logits"][:, -1])
                feed = {
                    "input_ids": row[-1][:, None],
                    "attention_mask": np.pad(
                        feed["attention_mask"], ((0, 0), (0, 1)), constant_values=1
                    ),
                    **{
                        key.replace("present", "past"): value
                        for key, value in outputs.items()
                        if key != "logits"
                    },
                }
        tokens.append(np.stack(row, axis=1))
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_allclose(logits[6:], logits[:6], atol=4e-6)


def concats(model: ir.Model) -> list[ir.Node]:
    """Return the nodes that join keys, and values, to their past, layer by layer."""
    return [node for node in model.graph if (node.name or "").startswith("present.")]


def read_above(model: ir.Model) -> None:
    """The mask follows from the length of the keys, which the fused node makes."""
    joined = concats(model)[0]
    shape = ir.node("Shape", [joined.outputs[0]], {"start": 2, "end": 3}, name="length")
    zero = ir.node("Sub", [shape.outputs[0], shape.outputs[0]], name="zero")
    total = next(node for node in model.graph if node.op_type == "Where")
    float_zero = ir.node("Cast", [zero.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="cast")
    added = ir.node("Add", [total.outputs[0], float_zero.outputs[0]], name="mask_of_keys")
    for node in (shape, zero, float_zero, added):
        node.outputs[0].name = f"{node.name}_out"
    added.outputs[0].shape, added.outputs[0].type = total.outputs[0].shape, total.outputs[0].type
    second = [node for node in model.graph if node.op_type == "Add"
              and total.outputs[0] in node.inputs][1]  # fmt: skip
    model.graph.insert_before(second, [shape, zero, float_zero, added])
    second.replace_input_with(list(second.inputs).index(total.outputs[0]), added.outputs[0])


def keys_alone(model: ir.Model) -> None:
    """Keys of a past; values that are joined by another operator."""
    for value in concats(model)[1::2]:
        past, new = value.inputs
        axes = add_initializer(model.graph, f"{value.name}_axis", np.array([2]))
        nothing = ir.node("Slice", [new, axes, axes, axes], name=f"{value.name}_none")
        nothing.outputs[0].name, nothing.outputs[0].type = f"{value.name}_none", new.type
        model.graph.insert_before(value, nothing)
        value.resize_inputs(3)
        value.replace_input_with(2, nothing.outputs[0])
        assert past is not None


def lengths_differ(model: ir.Model) -> None:
    """Nothing shows that the values' past is as long as the keys'."""
    for joined in concats(model)[1::2]:
        past = joined.inputs[0]
        assert past is not None
        assert past.shape is not None
        past.shape = ir.Shape([*past.shape[:2], "other", past.shape[3]])


def kept_inside(model: ir.Model) -> None:
    """The joined tensors are not read, as with a learnt prefix."""
    del model.graph.outputs[1:]


@pytest.mark.parametrize(
    ("change", "with_past"),
    [(read_above, 2), (keys_alone, 0), (lengths_differ, 0), (kept_inside, 0)],
)
@pytest.mark.parametrize("name", TOWERS)
def test_inputs_that_look_like_a_past_keep_their_numbers(
    name: str, change: Callable[[ir.Model], None], with_past: int, tmp_path: Path
) -> None:
    make, heads = TOWERS[name]
    model = ir.load(make(tmp_path / "given.onnx"))
    change(model)
    ir.save(model, tmp_path / "changed.onnx")
    made, path = fuse(tmp_path / "changed.onnx")
    joined = [n for n in made.graph if n.op_type == "Attention" and len(n.outputs) == 3]
    assert len(joined) == with_past
    feed = continued(2, 3, 4, kv_heads=heads)
    expected, got = run(tmp_path / "changed.onnx", feed), run(path, feed)
    for output, values in expected.items():
        np.testing.assert_allclose(got[output], values, atol=4e-6)


@pytest.mark.parametrize("part", ["key", "value"])
def test_heads_that_are_repeated_otherwise_are_left_alone(part: str, tmp_path: Path) -> None:
    """Tiled, not each n times: query 1 reads the second head, not the first."""
    model = ir.load(grouped_tower(tmp_path / "given.onnx", blocks=1))
    at = 0 if part == "key" else 1
    expand = [node for node in model.graph if node.op_type == "Expand"][at]
    unsqueeze = expand.inputs[0].producer() if expand.inputs[0] else None
    assert unsqueeze is not None
    axes = add_initializer(model.graph, "front", np.array([1]))
    shape = add_initializer(model.graph, "tile", np.array([1, HEADS // 2, 1, 1, 1]))
    unsqueeze.replace_input_with(1, axes)
    expand.replace_input_with(1, shape)
    size = WIDTH // HEADS
    for value in (unsqueeze.outputs[0], expand.outputs[0]):
        value.shape = None
    expand.outputs[0].shape = ir.Shape(["batch", HEADS // 2, 2, "total", size])
    unsqueeze.outputs[0].shape = ir.Shape(["batch", 1, 2, "total", size])
    assert not FuseAttention()(model).modified
