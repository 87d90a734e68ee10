"""Scaling channels: which layers go together, and that the function stays the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from towers import WIDTH, image_tower, images, text_tower, texts

from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.equalization import Group, ScaleChannels, find_groups
from mmedge.converters.passes.linears import Linear
from mmedge.errors import QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array, TensorSpec

TOWERS: dict[str, Callable[[Path], Path]] = {"image": image_tower, "text": text_tower}
FEEDS = {
    "image": [images(1), images(3)],
    "text": [texts(1, 2), texts(1, 9), texts(3, 9), texts(4, 17)],
}


def laid_out(tower: str, layout: str, folder: Path) -> Path:
    portable = TOWERS[tower](folder / "tower.onnx")
    if layout == "portable":
        return portable
    to_onnxruntime_layout(portable, folder / "ort.onnx")
    return folder / "ort.onnx"


def saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def powers(group: Group, seed: int) -> Array:
    exponents = np.random.default_rng(seed).integers(-6, 7, group.channels)
    return np.exp2(exponents).astype(np.float32)


def random_scales(groups: Sequence[Group], *, insert: bool = False) -> dict[str, Array]:
    return {
        linear.name: powers(group, at)
        for at, group in enumerate(groups)
        if group.source is not None or insert
        for linear in group.linears
    }


def names(groups: Sequence[Group]) -> list[set[str]]:
    return [{linear.name for linear in group.linears} for group in groups]


def assert_same_function(before: Path, after: Path, feeds: Sequence[dict[str, Array]]) -> None:
    onnx.checker.check_model(after, full_check=True)
    with open_session(before) as given, open_session(after) as made:

        def specs(side: tuple[TensorSpec, ...]) -> list[tuple[object, ...]]:
            return [(spec.name, spec.dtype, spec.shape) for spec in side]

        assert specs(made.inputs) == specs(given.inputs)
        assert specs(made.outputs) == specs(given.outputs)
        for feed in feeds:
            expected, got = given.run(feed), made.run(feed)
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("layout", ["portable", "onnxruntime"])
@pytest.mark.parametrize("tower", TOWERS)
def test_each_block_has_its_groups_in_every_layout(tower: str, layout: str, tmp_path: Path) -> None:
    groups = find_groups(ir.load(laid_out(tower, layout, tmp_path)).graph)
    if tower == "image":
        assert "Reshape" in groups[0].obstacle or "Transpose" in groups[0].obstacle
        groups = groups[1:]  # the patches
    assert [len(group.linears) for group in groups] == [3, 1, 1, 1, 3, 1, 1, 1, 1]
    for first in (0, 4):  # of a block: q, k and v; output projection; MLP
        qkv, out, up, down = groups[first : first + 4]
        assert isinstance(qkv.source, ir.Node)
        assert qkv.source.op_type == "LayerNormalization"
        assert isinstance(out.source, Linear)
        assert out.source.name in names([qkv])[0]
        assert isinstance(up.source, ir.Node)
        assert up.source.op_type == "LayerNormalization"
        assert down.source is None
        assert "no constant to fold" in down.obstacle
    assert not any(group.foreign or group.tied for group in groups)


@pytest.mark.parametrize("layout", ["portable", "onnxruntime"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("insert", [False, True])
def test_scaled_towers_give_bitwise_equal_outputs(
    tower: str, layout: str, insert: bool, tmp_path: Path
) -> None:
    # By name, from the portable layout, as the pipeline does.
    chosen = find_groups(ir.load(laid_out(tower, "portable", tmp_path)).graph)
    scales = random_scales(chosen, insert=insert)
    before = laid_out(tower, layout, tmp_path)
    model = ir.load(before)
    nodes = len(list(model.graph))
    result = ScaleChannels(scales, insert=scales.keys() if insert else ())(model)
    assert result.modified
    # The two MLPs, and the patches of images.
    expected = (3 if tower == "image" else 2) if insert else 0
    assert len(list(result.model.graph)) - nodes == expected
    assert_same_function(before, saved(result.model, tmp_path / "after.onnx"), FEEDS[tower])


def test_activations_and_weights_really_are_scaled(tmp_path: Path) -> None:
    model = ir.load(text_tower(tmp_path / "text.onnx"))
    group = find_groups(model.graph)[0]
    scales = powers(group, 0)
    before = [linear.matrix() for linear in group.linears]
    assert isinstance(group.source, ir.Node)
    gain = group.source.inputs[1]
    assert gain is not None
    assert gain.const_value is not None
    old_gain = gain.const_value.numpy().copy()
    ScaleChannels({linear.name: scales for linear in group.linears})(model)
    assert gain.const_value is not None
    np.testing.assert_array_equal(gain.const_value.numpy(), old_gain / scales)
    for linear, old in zip(find_groups(model.graph)[0].linears, before, strict=True):
        np.testing.assert_array_equal(linear.matrix(), old * scales[:, None])


def test_it_does_nothing_without_scales_and_scales_again_when_applied_again(
    tmp_path: Path,
) -> None:
    source = text_tower(tmp_path / "text.onnx")
    model = ir.load(source)
    assert not ScaleChannels({})(model).modified
    scales = random_scales(find_groups(model.graph))
    ScaleChannels(scales)(model)
    ScaleChannels({name: 1 / factors for name, factors in scales.items()})(model)
    theirs = ir.load(source).graph.initializers
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        other = theirs[name].const_value
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


def small(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    widths: dict[str, tuple[int, ...]],
) -> Path:
    """Write a graph over x (batch, sequence, 8), its initializers random."""
    rng = np.random.default_rng(0)
    made = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in widths.items()
    ]

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 8])

    graph = helper.make_graph(nodes, "small", [value("x")], [value(o) for o in outputs], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    path = folder / "small.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], f"node_{output}", **attributes)


NORM = node("LayerNormalization", "x g b", "n", axis=-1)
NORM_SHAPES: dict[str, tuple[int, ...]] = {"g": (8,), "b": (8,)}


@pytest.mark.parametrize(
    ("nodes", "outputs", "shapes", "obstacle"),
    [
        pytest.param(
            [node("MatMul", "n w", "p"), node("Relu", "n", "r"), node("Add", "p r", "y")],
            ["y"],
            {"w": (8, 8)},
            "Relu node_r reads 'n' too",
            id="another reader",
        ),
        pytest.param(
            [node("MatMul", "n w", "p"), node("Add", "p n", "y")],
            ["y"],
            {"w": (8, 8)},
            "Add node_y reads 'n' too",
            id="added to the product",
        ),
        pytest.param(
            [node("MatMul", "n w", "y")],
            ["y", "n"],
            {"w": (8, 8)},
            "an output of the graph reads 'n' too",
            id="an output",
        ),
        pytest.param(
            [node("MatMul", "n w", "p"), node("MatMul", "p w", "y")],
            ["y"],
            {"w": (8, 8)},
            "weight 'w' has other readers",
            id="a tied weight",
        ),
        pytest.param(
            [
                node("LayerNormalization", "x g", "m", axis=-1),
                node("MatMul", "n w", "p"),
                node("Add", "p m", "y"),
            ],
            ["y"],
            {"w": (8, 8)},
            "'g' is not a constant of only this layer",
            id="a shared gain",
        ),
        pytest.param(
            [node("Gelu", "n", "a"), node("MatMul", "a w", "y")],
            ["y"],
            {"w": (8, 8)},
            "'a' is made by Gelu node_a, which cannot take a scale",
            id="a nonlinearity",
        ),
        pytest.param(
            [
                node("MatMul", "n wv", "v"),
                node("MatMul", "x wq", "q"),
                node("Attention", "q v v", "a", q_num_heads=2, kv_num_heads=2),
                node("MatMul", "a w", "y"),
            ],
            ["y"],
            {"w": (8, 8), "wv": (8, 8), "wq": (8, 8)},
            "'a' is made by Attention node_a, which cannot take a scale",
            id="values that are keys too",
        ),
        pytest.param(
            [
                node("MatMul", "n wv", "v"),
                node("MatMul", "x wq", "q"),
                node("MatMul", "x wk", "k"),
                node("Attention", "q k v", "a", q_num_heads=4, kv_num_heads=2),
                node("MatMul", "a w", "y"),
            ],
            ["y"],
            {"w": (8, 8), "wv": (8, 4), "wq": (8, 8), "wk": (8, 4)},
            "'a' is made by Attention node_a, which cannot take a scale",
            id="values shared by heads",
        ),
    ],
)
def test_unfoldable_adapters_are_refused_with_a_reason(
    nodes: list[onnx.NodeProto],
    outputs: list[str],
    shapes: dict[str, tuple[int, ...]],
    obstacle: str,
    tmp_path: Path,
) -> None:
    path = small(tmp_path, [NORM, *nodes], outputs, {**NORM_SHAPES, **shapes})
    model = ir.load(path)
    (group,) = [group for group in find_groups(model.graph) if names([group])[0] & {"w"}][-1:]
    assert group.source is None
    assert group.obstacle == obstacle
    untouched = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises((QuantizationError, ir.passes.PassError), match=r"Cannot scale|differ"):
        ScaleChannels({"w": powers(group, 0)})(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == untouched
    if group.tied:
        with pytest.raises(QuantizationError, match="other readers"):
            ScaleChannels({"w": powers(group, 0)}, insert={"w"})(model)
        return
    # A Mul before the layer changes nothing for the others.
    ScaleChannels({"w": powers(group, 0)}, insert={"w"})(model)
    feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}
    assert_same_function(path, saved(model, tmp_path / "after.onnx"), [feed])


@pytest.mark.parametrize(
    ("nodes", "shapes"),
    [
        pytest.param(
            [node("Mul", "g x", "s"), node("MatMul", "s w", "y")],
            {"g": (8,), "w": (8, 8)},
            id="a product with a constant",
        ),
        pytest.param(
            [
                node("Gemm", "f w1 b1", "h", transB=1),
                node("Gemm", "h w b", "z", transB=1),
            ],
            {"w1": (8, 8), "b1": (8,), "w": (8, 8), "b": (8,)},
            id="a layer before it, stored transposed",
        ),
        pytest.param(
            [NORM, node("Reshape", "n rows", "r"), node("MatMul", "r w", "y")],
            {**NORM_SHAPES, "w": (8, 8)},
            id="rows regrouped on the way",
        ),
    ],
)
def test_other_sources_take_scales_in(
    nodes: list[onnx.NodeProto], shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    outer = {
        "Gemm": ([node("Reshape", "x flat", "f")], [node("Reshape", "z whole", "y")]),
    }.get(nodes[0].op_type, ([], []))
    path = small(tmp_path, [*outer[0], *nodes, *outer[1]], ["y"], shapes)
    proto = onnx.load(path)
    for name, axes in (("flat", [-1, 8]), ("whole", [2, 3, 8]), ("rows", [2, 3, 8])):
        if any(name in made.input for made in proto.graph.node):
            tensor = numpy_helper.from_array(np.array(axes, np.int64), name)
            proto.graph.initializer.append(tensor)
    onnx.save(onnx.shape_inference.infer_shapes(proto, data_prop=True), path)
    model = ir.load(path)
    group = next(group for group in find_groups(model.graph) if names([group]) == [{"w"}])
    assert group.obstacle == ""
    count = len(list(model.graph))
    ScaleChannels({"w": powers(group, 3)})(model)
    assert len(list(model.graph)) == count
    feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}
    assert_same_function(path, saved(model, tmp_path / "after.onnx"), [feed])


def test_bad_scales_are_refused_by_name(tmp_path: Path) -> None:
    model = ir.load(text_tower(tmp_path / "text.onnx"))
    group = find_groups(model.graph)[0]
    first, second, third = (linear.name for linear in group.linears)
    good = np.ones(WIDTH, np.float32)
    same = {first: good, second: good, third: good}
    refused: list[tuple[dict[str, Array], str]] = [
        ({"tower.absent": good}, "No linear layer 'tower.absent'"),
        ({first: good}, f"'{second}' differ"),
        ({**same, third: 2 * good}, f"'{third}' differ"),
        (dict.fromkeys(same, good[1:]), rf"got shape \({WIDTH - 1},\), expected \({WIDTH},\)"),
        (dict.fromkeys(same, 0 * good), "must be positive"),
        (dict.fromkeys(same, np.inf * good), "must be positive"),
    ]
    for scales, message in refused:
        with pytest.raises(QuantizationError, match=message):
            ScaleChannels(scales)(model)
