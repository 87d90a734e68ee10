"""Scales chosen by predicted error: towers with outliers, dead channels, layers kept in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from towers import image_tower, images, text_tower, texts

from mmedge.converters.methods.configs import Equalization
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.equalization import ScaleChannels, find_groups
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.converters.statistics import equalization
from mmedge.converters.statistics.collect import collect_ranges
from mmedge.converters.statistics.equalization import Scales, choose_scales, equalize
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

TOWERS: dict[str, Callable[[Path], Path]] = {"image": image_tower, "text": text_tower}
FEEDS = {
    "image": [images(4, seed) for seed in range(4)],
    "text": [texts(4, 5 + 3 * seed, seed) for seed in range(4)],
}
UNSEEN = {"image": images(16, 99), "text": texts(16, 12, 99)}
OUTLIER = 64.0


def stream(tower: str) -> Callable[[], Iterator[Mapping[str, Array]]]:
    return lambda: iter(FEEDS[tower])


def run(model: Path, feed: Mapping[str, Array]) -> Array:
    with open_session(model) as session:
        return next(iter(session.run(feed).values()))


def with_outliers(tower: str, folder: Path) -> Path:
    """Write a tower of the same function, two channels of each foldable group 64 times larger."""
    model = ir.load(TOWERS[tower](folder / "even.onnx"))
    rng = np.random.default_rng(7)
    scales: dict[str, Array] = {}
    for group in find_groups(model.graph):
        if group.source is not None:
            factors = np.ones(group.channels, np.float32)
            factors[rng.choice(group.channels, 2, replace=False)] = 1 / OUTLIER
            scales.update({linear.name: factors for linear in group.linears})
    ScaleChannels(scales)(model)
    ir.save(model, folder / "tower.onnx", external_data="tower.onnx.data")
    return folder / "tower.onnx"


def cosine_of_int8(model: Path, tower: str, *, dynamic: bool) -> float:
    """Return the smallest cosine of int8's outputs to those of the float graph."""
    graph = ir.load(model)
    ranges = collect_ranges(model, quantizable_inputs(graph), stream(tower))
    Int8Linears("dynamic" if dynamic else "operators", ranges)(graph)
    out = model.with_name(f"{model.stem}.int8.onnx")
    ir.save(graph, out)
    expected, got = run(model, UNSEEN[tower]), run(out, UNSEEN[tower])
    return float((expected * got).sum(-1).min())


def scaled(scales: Scales) -> dict[str, Array]:
    return {
        name: group.scales
        for group in scales.groups
        if group.scales is not None
        for name in group.linears
    }


@pytest.mark.parametrize("tower", TOWERS)
def test_int8_of_a_tower_with_outliers_is_mended_and_float_stays_the_same(
    tower: str, tmp_path: Path
) -> None:
    portable = with_outliers(tower, tmp_path)
    out = tmp_path / "equalized.onnx"
    scales = equalize(portable, out, stream(tower), Equalization())
    onnx.checker.check_model(out, full_check=True)
    np.testing.assert_array_equal(run(out, UNSEEN[tower]), run(portable, UNSEEN[tower]))
    for dynamic in (False, True):
        before = cosine_of_int8(portable, tower, dynamic=dynamic)
        after = cosine_of_int8(out, tower, dynamic=dynamic)
        assert before < 0.99
        assert after > 0.998
    changed = [group for group in scales.groups if group.scales is not None]
    assert len(changed) == 6
    for group in changed:
        assert group.error_after < group.error_before / 20
        assert group.strength is not None
        assert not group.inserted


@pytest.mark.parametrize("tower", TOWERS)
def test_scales_of_one_layout_serve_the_other(tower: str, tmp_path: Path) -> None:
    portable = with_outliers(tower, tmp_path)
    scales = choose_scales(portable, stream(tower), Equalization())
    layout = tmp_path / "ort.onnx"
    to_onnxruntime_layout(portable, layout)
    model = ir.load(layout)
    scales.step()(model)
    out = tmp_path / "equalized.onnx"
    ir.save(model, out)
    np.testing.assert_array_equal(run(out, UNSEEN[tower]), run(layout, UNSEEN[tower]))
    assert cosine_of_int8(out, tower, dynamic=False) > 0.998
    # Chosen from that layout itself, its last block knows the pooled token alone: nearly the same.
    own = scaled(choose_scales(layout, stream(tower), Equalization()))
    assert own.keys() == scaled(scales).keys()


def test_scales_are_powers_of_two_and_undo_the_outliers(tmp_path: Path) -> None:
    portable = with_outliers("image", tmp_path)
    for group in choose_scales(portable, stream("image"), Equalization()).groups:
        if group.scales is None:
            continue
        assert group.scales.dtype == np.float32
        exponents = np.log2(group.scales)
        np.testing.assert_array_equal(exponents, np.rint(exponents))
        assert np.median(group.scales) == 1
        assert sorted(group.scales)[-2] >= OUTLIER / 4  # the two channels that were blown up
        assert sorted(group.scales)[-3] <= 4


def test_the_search_is_never_worse_than_a_fixed_strength_by_its_own_measure(
    tmp_path: Path,
) -> None:
    portable = with_outliers("text", tmp_path)
    searched = choose_scales(portable, stream("text"), Equalization())
    for strength in (0.0, 0.5, 1.0):
        fixed = choose_scales(portable, stream("text"), Equalization(strength))
        for ours, theirs in zip(searched.groups, fixed.groups, strict=True):
            assert ours.linears == theirs.linears
            # The values' columns have taken in other scales by the time q, k and v are looked at.
            if theirs.scales is None or len(theirs.linears) > 1:
                continue
            assert theirs.strength == strength
            assert ours.error_after <= theirs.error_after
    strengths = {group.strength for group in searched.groups if group.scales is not None}
    assert len(strengths) > 1


def one_layer(folder: Path, x: Array, weight: Array, gain: Array, bias: Array) -> Path:
    """Write rows x (n, C) -> Mul with a constant -> a linear layer -> Relu."""
    made = {"gain": gain, "layer.weight": weight, "layer.bias": bias}
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "gain"], ["scaled"], "scale"),
            helper.make_node("MatMul", ["scaled", "layer.weight"], ["product"], "product"),
            helper.make_node("Add", ["product", "layer.bias"], ["sum"], "bias"),
            helper.make_node("Relu", ["sum"], ["y"], "relu"),
        ],
        "one_layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in made.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "layer.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def case(seed: int = 0, channels: int = 48, outputs: int = 24) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((600, channels)).astype(np.float32),
        "weight": rng.standard_normal((channels, outputs)),
        "gain": np.exp(rng.standard_normal(channels)),
        "bias": np.full(outputs, 1e4),  # the Relu lets all of it through
    }


def decide(folder: Path, parts: dict[str, Array], config: Equalization, **how: bool) -> Scales:
    path = one_layer(folder, **parts)
    return choose_scales(path, lambda: iter([{"x": parts["x"]}]), config, **how)


@pytest.mark.parametrize("strength", [None, 0.0, 0.8])
def test_the_predicted_error_is_the_measured_one(strength: float | None, tmp_path: Path) -> None:
    parts = case()
    path = one_layer(tmp_path, **{**parts, "bias": np.zeros(24)})
    ranges = {"x": parts["x"]}
    (group,) = choose_scales(path, lambda: iter([ranges]), Equalization(strength)).groups
    assert group.scales is not None
    activations = parts["x"] * parts["gain"].astype(np.float32)
    weight = parts["weight"].astype(np.float32)
    energy = np.square(activations @ weight).sum()

    def measured(scales: Array) -> float:
        x, w = activations / scales, weight * scales[:, None]
        steps = np.abs(w).max(0) / 127
        low, high = min(x.min(), 0), max(x.max(), 0)
        step = (high - low) / 255
        zero = round(-low / step)
        quantized = np.clip(np.rint(x / step) + zero, 0, 255) - zero
        return float(
            np.square(step * quantized @ (np.rint(w / steps) * steps) - activations @ weight).sum()
            / energy
        )

    assert group.error_before == pytest.approx(measured(np.ones(48)), rel=0.1)
    assert group.error_after == pytest.approx(measured(group.scales), rel=0.1)


def test_dead_activations_and_dead_weights_decide_nothing(tmp_path: Path) -> None:
    parts = case()
    parts["gain"][:5] = 0.0  # activations that are always 0
    parts["weight"][5:9] = 0.0  # read by nothing
    parts["gain"][5] = 1e4  # and large at that
    (group,) = decide(tmp_path, parts, Equalization()).groups
    assert group.scales is not None
    assert np.isfinite(group.scales).all()
    # The unread large one no longer sets the range.
    largest = np.abs(parts["x"] * parts["gain"]).max(0) / group.scales
    assert largest[5] <= 2 * np.delete(largest, 5).max()
    assert group.error_after < group.error_before / 100


@pytest.mark.parametrize("what", ["weight", "gain"])
def test_a_layer_of_zeros_is_left_alone(what: str, tmp_path: Path) -> None:
    parts = case()
    parts[what] = np.zeros_like(parts[what])
    (group,) = decide(tmp_path, parts, Equalization()).groups
    assert group.scales is None
    assert group.reason == "no strength makes its error smaller"
    assert group.error_before == 0


def test_a_fixed_strength_is_used_unchanged(tmp_path: Path) -> None:
    parts = case()
    (group,) = decide(tmp_path, parts, Equalization(1.0)).groups
    assert group.strength == 1.0
    assert group.scales is not None
    largest = np.abs(parts["x"] * parts["gain"]).max(0) / group.scales
    assert largest.max() / largest.min() <= 2  # all of the spread is gone, but for powers of two
    even = {**parts, "x": np.sign(parts["x"]), "gain": np.ones(48)}
    (group,) = decide(tmp_path, even, Equalization(1.0)).groups
    assert group.scales is None
    assert group.reason == "its channels are even"


def test_excluded_layers_do_not_count_but_move_with_their_group(tmp_path: Path) -> None:
    portable = with_outliers("image", tmp_path)
    groups = find_groups(ir.load(portable).graph)
    qkv = tuple(linear.name for linear in groups[1].linears)
    out = groups[2].linears[0].name
    everything = choose_scales(portable, stream("image"), Equalization())
    kept = choose_scales(portable, stream("image"), Equalization(), keep=(qkv[0], out))
    assert kept.groups[1].linears == qkv
    assert kept.groups[1].error_before != everything.groups[1].error_before
    assert kept.groups[2].scales is None
    assert kept.groups[2].reason == "excluded"
    model = ir.load(portable)
    kept.step()(model)
    ir.save(model, tmp_path / "kept.onnx")
    np.testing.assert_array_equal(
        run(tmp_path / "kept.onnx", UNSEEN["image"]), run(portable, UNSEEN["image"])
    )


def test_moments_held_a_few_at_a_time_give_the_same_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portable = with_outliers("text", tmp_path)
    at_once = scaled(choose_scales(portable, stream("text"), Equalization()))
    monkeypatch.setattr(equalization, "_MOMENTS_BYTES", 1)
    one_by_one = scaled(choose_scales(portable, stream("text"), Equalization()))
    assert at_once.keys() == one_by_one.keys()
    for name, scales in at_once.items():
        np.testing.assert_array_equal(one_by_one[name], scales)


def test_unquantized_layers_have_a_reason(tmp_path: Path) -> None:
    scales = choose_scales(with_outliers("text", tmp_path), stream("text"), Equalization())
    reasons = [group.reason for group in scales.groups if group.scales is None]
    assert len(reasons) == 3
    assert ["no constant to fold" in reason for reason in reasons] == [True, True, False]
    assert reasons[-1] == "makes the embedding and stays in float"


def test_a_mul_is_put_in_only_where_allowed_and_worth_it(tmp_path: Path) -> None:
    """Before an MLP's second layer, whose input has outliers that no layer before can take."""
    portable = image_tower(tmp_path / "tower.onnx")
    model = ir.load(portable)
    down = find_groups(model.graph)[4].linears[0]
    up = find_groups(model.graph)[3].linears[0]
    assert up.bias is not None
    for value, factor in ((up.weight, 60.0), (up.bias, 60.0), (down.weight, 1 / 60)):
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[(slice(None), [3, 9]) if value is up.weight else [3, 9]] *= factor
        value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, portable, external_data="tower.onnx.data")
    without = choose_scales(portable, stream("image"), Equalization())
    assert down.name not in scaled(without)
    allowed = choose_scales(portable, stream("image"), Equalization(), insert=True)
    assert [group.linears for group in allowed.groups if group.inserted] == [(down.name,)]
    other = next(g for g in allowed.groups if g.scales is None and "would not gain" in g.reason)
    assert "no constant to fold" in other.reason
    model = ir.load(portable)
    allowed.step()(model)
    out = tmp_path / "inserted.onnx"
    ir.save(model, out)
    np.testing.assert_array_equal(run(out, UNSEEN["image"]), run(portable, UNSEEN["image"]))
    assert cosine_of_int8(out, "image", dynamic=False) > cosine_of_int8(
        portable, "image", dynamic=False
    )


def test_signed_activations_have_a_coarser_step_where_they_are_one_sided(tmp_path: Path) -> None:
    parts = case()
    parts["x"] = np.abs(parts["x"])
    path = one_layer(tmp_path, **parts)
    by_dtype = [
        choose_scales(
            path, lambda: iter([{"x": parts["x"]}]), Equalization(), activations=activations
        ).groups[0]
        for activations in ("uint8", "int8")
    ]
    assert by_dtype[1].error_before > 2 * by_dtype[0].error_before


def test_bad_input_is_named(tmp_path: Path) -> None:
    parts = case()
    path = one_layer(tmp_path, **parts)
    with pytest.raises(CalibrationError, match="got 0 samples"):
        choose_scales(path, lambda: iter(()), Equalization())
    bad = parts["x"].copy()
    bad[3, 4] = np.nan
    with pytest.raises(QuantizationError, match="'scaled' is NaN or infinite"):
        choose_scales(path, lambda: iter([{"x": bad}]), Equalization())
    parts["weight"][0, 0] = np.inf
    with pytest.raises(QuantizationError, match=r"'layer\.weight' holds NaN or infinite"):
        decide(tmp_path, parts, Equalization())
