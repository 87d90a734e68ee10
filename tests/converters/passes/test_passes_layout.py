"""The passes for ONNX Runtime's layout change no output."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from towers import (
    IMAGE,
    MLP,
    WIDTH,
    Graph,
    convolution_tower,
    image_tower,
    images,
    text_tower,
    texts,
)

from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.attention import FuseAttention
from mmedge.converters.passes.matching import sizes
from mmedge.converters.passes.patch_embedding import PatchEmbeddingAsMatMul
from mmedge.converters.passes.pooled_token import SelectTokenEarly
from mmedge.errors import ConversionError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def operators(model: Path | ir.Model) -> Counter[str]:
    graph = ir.load(model) if isinstance(model, Path) else model
    return Counter(node.op_type for node in graph.graph)


def apply(step: ir.passes.PassBase, source: Path, out: Path) -> bool:
    result = step(ir.load(source))
    ir.save(result.model, out)
    return result.modified


def test_layout_gives_the_same_embeddings_for_images_of_any_batch(tmp_path: Path) -> None:
    portable, layout = image_tower(tmp_path / "image.onnx"), tmp_path / "image.ort.onnx"
    to_onnxruntime_layout(portable, layout)
    for batch in (1, 2, 5):
        feed = images(batch)
        np.testing.assert_allclose(run(layout, feed), run(portable, feed), atol=2e-6)


def test_layout_gives_the_same_embeddings_for_texts_of_any_length(tmp_path: Path) -> None:
    portable, layout = text_tower(tmp_path / "text.onnx"), tmp_path / "text.ort.onnx"
    to_onnxruntime_layout(portable, layout)
    for batch, length in ((1, 2), (3, 7), (4, 19)):
        feed = texts(batch, length)
        np.testing.assert_allclose(run(layout, feed), run(portable, feed), atol=2e-6)


def test_layout_shares_the_weights_of_the_portable_file(tmp_path: Path) -> None:
    portable, layout = image_tower(tmp_path / "image.onnx"), tmp_path / "image.ort.onnx"
    to_onnxruntime_layout(portable, layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "image.onnx",
        "image.onnx.data",
        "image.ort.onnx",
    ]
    assert layout.stat().st_size < (tmp_path / "image.onnx.data").stat().st_size / 2


def test_layout_in_another_folder_is_refused(tmp_path: Path) -> None:
    portable = image_tower(tmp_path / "image.onnx")
    with pytest.raises(ConversionError, match="must be in the folder of"):
        to_onnxruntime_layout(portable, tmp_path / "elsewhere" / "image.onnx")


@pytest.mark.parametrize("make", [image_tower, text_tower])
def test_attention_becomes_one_node_a_block(make: object, tmp_path: Path) -> None:
    assert callable(make)
    source = make(tmp_path / "tower.onnx", blocks=3)
    assert apply(FuseAttention(), source, tmp_path / "fused.onnx")
    counted = operators(tmp_path / "fused.onnx")
    assert counted["Attention"] == 3
    assert counted["Softmax"] == 0
    assert counted["IsNaN"] == 0
    assert ir.load(tmp_path / "fused.onnx").opset_imports[""] == 23
    onnx.checker.check_model(tmp_path / "fused.onnx")


def test_a_row_whose_keys_are_all_masked_stays_finite(tmp_path: Path) -> None:
    """torch guards with IsNaN, Where; the fused node must not bring the NaN back."""
    source = text_tower(tmp_path / "text.onnx")
    model = onnx.load(source)
    for node in model.graph.node:  # now token 0 sees nothing at all
        if node.op_type == "LessOrEqual":
            node.op_type = "Less"
    onnx.save(model, source)
    apply(FuseAttention(), source, tmp_path / "fused.onnx")
    feed = texts(2, 6)
    assert np.isfinite(run(tmp_path / "fused.onnx", feed)).all()


def test_attention_over_another_axis_is_left_alone(tmp_path: Path) -> None:
    source = image_tower(tmp_path / "image.onnx", blocks=1)
    model = ir.load(source)
    for node in model.graph:
        if node.op_type == "Softmax":
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
    assert not FuseAttention()(model).modified
    assert operators(model)["Softmax"] == 1


def test_a_graph_with_an_operator_that_changed_meaning_keeps_its_opset(tmp_path: Path) -> None:
    model = ir.load(image_tower(tmp_path / "image.onnx"))
    model.graph.append(ir.node("GroupNormalization", [None, None, None]))
    assert not FuseAttention()(model).modified
    assert model.opset_imports[""] == 20


def test_patch_convolution_becomes_a_product(tmp_path: Path) -> None:
    source = convolution_tower(tmp_path / "image.onnx", blocks=1)
    assert apply(PatchEmbeddingAsMatMul(), source, tmp_path / "product.onnx")
    assert operators(tmp_path / "product.onnx")["Conv"] == 0
    feed = images(3)
    np.testing.assert_allclose(run(tmp_path / "product.onnx", feed), run(source, feed), atol=2e-6)


def test_padded_patches_stay_a_convolution(tmp_path: Path) -> None:
    source = convolution_tower(tmp_path / "image.onnx", blocks=1, pads=4)
    assert IMAGE % 8 == 0
    assert not apply(PatchEmbeddingAsMatMul(), source, tmp_path / "same.onnx")


@pytest.mark.parametrize(("make", "selection"), [(image_tower, "Gather"), (text_tower, "GatherND")])
@pytest.mark.parametrize("fused_first", [False, True])
def test_the_last_block_works_on_one_token(
    make: object, selection: str, fused_first: bool, tmp_path: Path
) -> None:
    assert callable(make)
    source = make(tmp_path / "tower.onnx", blocks=2)
    passes = [FuseAttention(), SelectTokenEarly()]
    for step in passes if fused_first else reversed(passes):
        assert apply(step, source, tmp_path / f"{type(step).__name__}.onnx")
        source = tmp_path / f"{type(step).__name__}.onnx"
    model = ir.load(source)
    nodes = list(model.graph)
    attention = [node for node in nodes if node.op_type == "Attention"]
    assert len(attention) == 2
    one_token = [
        node
        for node in nodes
        if node.op_type == "MatMul"
        and node.outputs[0].shape is not None
        and node.outputs[0].shape[1] == 1
    ]
    # The last block's query, output projection and both layers of its MLP; never key or value.
    assert len(one_token) == 4
    assert attention[0].outputs[0].shape is not None
    assert attention[0].outputs[0].shape[1] != 1
    assert any(node.op_type == selection for node in nodes)


def test_attention_of_another_form_is_left_and_what_follows_it_narrowed(tmp_path: Path) -> None:
    """As EVA's, whose queries are turned by their places."""
    graph = Graph(0)
    x = graph.norm(graph.attention("x", None, turn=True))
    x = graph.node("Add", x, graph.linear(graph.linear(x, WIDTH, MLP), MLP, WIDTH))
    graph.embed(graph.node("Gather", x, graph.constant(1, "int64"), axis=1))
    x_info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5, WIDTH])
    source = graph.save(tmp_path / "given.onnx", [x_info])
    assert apply(SelectTokenEarly(), source, tmp_path / "made.onnx")
    feed = {"x": np.random.default_rng(0).standard_normal((3, 5, WIDTH)).astype(np.float32)}
    with open_session(source) as given, open_session(tmp_path / "made.onnx") as made:
        np.testing.assert_allclose(made.run(feed)["embeds"], given.run(feed)["embeds"], atol=2e-6)
    narrow = [
        node.op_type
        for node in ir.load(tmp_path / "made.onnx").graph
        if node.op_type == "MatMul" and (sizes(node.outputs[0]) or (0, 0))[1] == 1
    ]
    assert len(narrow) == 3  # the output projection and the MLP


def test_without_a_product_the_selection_stays(tmp_path: Path) -> None:
    graph = Graph(0)
    x = graph.norm("x")
    graph.embed(graph.node("Gather", x, graph.constant(0, "int64"), axis=1))
    x_info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5, WIDTH])
    source = graph.save(tmp_path / "given.onnx", [x_info])
    assert not apply(SelectTokenEarly(), source, tmp_path / "same.onnx")
