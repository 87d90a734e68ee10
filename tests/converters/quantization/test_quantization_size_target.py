"""A size target: the layers that matter least go to half the bits, and no more than are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from roles import role, role_inputs
from towers import image_tower, images, text_tower, texts

from mmedge.bundle.nodes import NodeEntry, load_nodes
from mmedge.converters.graphs.parity import Probe
from mmedge.converters.methods.configs import WeightOnly
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quantization.size_target import (
    choose_lowered,
    constant_bytes,
    half_bytes,
    weight_only_pass,
)
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.variants.builder import VariantBuilder
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

INT4 = WeightOnly(group_size=16)


def feeds() -> Iterator[dict[str, Array]]:
    for seed in range(4):
        yield images(3, seed=100 + seed)


def text_feeds() -> Iterator[dict[str, Array]]:
    for seed in range(4):
        yield texts(3, 9, seed=100 + seed)


def unread() -> Iterator[dict[str, Array]]:
    raise AssertionError("nothing has to be measured")
    yield


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A tower of which one MLP hardly matters: it gives a thousandth of what it gave."""
    portable, out = image_tower(tmp_path / "image.onnx"), tmp_path / "image.ort.onnx"
    model = ir.load(portable)
    ir.external_data.load_to_model(model)
    weight = next(x.weight for x in find_linears(model.graph) if x.name == idle(model)[1])
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() / 1000, name=weight.name)
    ir.save(model, portable, external_data=f"{portable.name}.data")
    to_onnxruntime_layout(portable, out)
    return out


def idle(model: ir.Model) -> tuple[str, str]:
    """The MLP of the first block, which its residual connection goes around."""
    linears = find_linears(model.graph)
    first = next(linear.name for linear in linears if linear.shape == (32, 64))
    return first, next(linear.name for linear in linears if linear.shape == (64, 32))


def share(model: Path | ir.Model, source: Path) -> float:
    graph = ir.load(model) if isinstance(model, Path) else model
    return constant_bytes(graph) / half_bytes(ir.load(source))


def share_at(source: Path, config: WeightOnly) -> float:
    graph = ir.load(source)
    weight_only_pass(config)(graph)
    return share(graph, source)


def lowered(entries: tuple[NodeEntry, ...], precision: str = "int2") -> list[str]:
    return [entry.name for entry in entries if entry.precision == precision]


def test_the_least_sensitive_layer_is_lowered_with_a_reason(tower: Path) -> None:
    out = tower.with_name("few.onnx")
    plain = share_at(tower, INT4)
    config = replace(INT4, at_most=plain - 0.001)
    entries = quantize(tower, out, config, calibration=feeds)
    assert share(out, tower) <= plain - 0.001 < plain
    (name,) = lowered(entries)
    assert name in idle(ir.load(tower))
    for entry in entries:
        if entry.precision == "int2":
            assert entry.output_error is not None
            assert entry.output_error < 1e-4
            assert entry.reason.startswith(f"2 bits for {plain - 0.001:.4g} of fp16: least effect")
        else:
            assert entry.output_error is None
            assert entry.reason == ("makes the embedding" if entry.precision == "int8" else "")
    # The same layers by name, without data.
    again = tower.with_name("again.onnx")
    found = quantize(tower, again, replace(INT4, lowered=tuple(lowered(entries))))
    assert share(again, tower) == share(out, tower)
    assert [entry.reason for entry in found if entry.precision == "int2"] == ["2 bits by name"]


def test_the_chosen_layers_hurt_less_than_the_others(tower: Path) -> None:
    plain, all_names = share_at(tower, INT4), [x.name for x in find_linears(ir.load(tower).graph)]
    least = share_at(tower, replace(INT4, lowered=tuple(all_names[:-1])))
    config = replace(INT4, at_most=(plain + least) / 2)
    steps: list[tuple[int, int]] = []
    chosen = choose_lowered(
        tower, config, feeds, advance=lambda done, total: steps.append((done, total))
    )
    assert steps == [(done, len(all_names) - 1) for done in range(1, len(all_names))]
    others = tuple(name for name in all_names[:-1] if name not in chosen)
    feed, errors = images(6, seed=9), []
    for names in (tuple(chosen), others):
        out = tower.with_name("few.onnx")
        quantize(tower, out, replace(INT4, lowered=names))
        with open_session(out) as few, open_session(tower) as full:
            errors.append(1 - (few.run(feed)["embeds"] * full.run(feed)["embeds"]).sum(1).mean())
    assert errors[0] < errors[1]
    # None of them is more than is needed.
    for name in chosen:
        fewer = tuple(other for other in chosen if other != name)
        assert share_at(tower, replace(INT4, lowered=fewer)) > (plain + least) / 2


def test_a_target_that_holds_already_lowers_nothing(tower: Path) -> None:
    config = replace(INT4, at_most=share_at(tower, INT4))
    assert choose_lowered(tower, config, unread) == {}
    assert choose_lowered(tower, INT4, unread) == {}


def test_lowered_layers_are_rounded_as_the_others(tower: Path) -> None:
    name, errors = idle(ir.load(tower))[1], {}
    for rounding in ("rtn", "gptq"):
        config = replace(INT4, rounding=rounding, lowered=(name,))  # type: ignore[arg-type]
        entries = quantize(tower, tower.with_name("few.onnx"), config, calibration=feeds)
        errors[rounding] = next(e.weight_error for e in entries if e.name == name)
    assert errors["gptq"] > errors["rtn"]  # what GPTQ gives away in weights it gains in answers


def test_gptq_is_measured_as_gptq(tower: Path) -> None:
    *names, _last = (linear.name for linear in find_linears(ir.load(tower).graph))
    least = share_at(tower, replace(INT4, lowered=tuple(names)))
    errors = {}
    for rounding in ("rtn", "gptq"):
        config = replace(INT4, rounding=rounding, at_most=least)  # type: ignore[arg-type]
        errors[rounding] = choose_lowered(tower, config, feeds)
    assert list(errors["rtn"]) == list(errors["gptq"]) == names
    assert sum(errors["gptq"].values()) < sum(errors["rtn"].values())


def test_eight_bits_go_to_four(tower: Path) -> None:
    config = replace(INT4, bits=8)
    at_most = share_at(tower, config) - 0.02
    out = tower.with_name("few.onnx")
    entries = quantize(tower, out, replace(config, at_most=at_most), calibration=feeds)
    assert share(out, tower) <= at_most
    assert lowered(entries, "int4")
    # The layer that makes the embedding is never lowered.
    assert entries[-1].precision == "int8"


def test_a_table_is_lowered_too(tmp_path: Path) -> None:
    source, out = text_tower(tmp_path / "text.onnx"), tmp_path / "few.onnx"
    entries = quantize(source, out, replace(INT4, at_most=0.25), calibration=text_feeds)
    assert share(out, source) <= 0.25
    (table,) = [entry.name for entry in entries if entry.op_type == "Gather"]
    assert lowered(entries) == [table]
    with open_session(out) as few, open_session(source) as full:
        feed = texts(4, 9)
        assert (few.run(feed)["embeds"] * full.run(feed)["embeds"]).sum(1).min() > 0.8


def test_an_unreachable_target_is_refused_with_the_smallest_size(tower: Path) -> None:
    with pytest.raises(
        QuantizationError,
        match=r"cannot be reached: got 0\.\d+ of fp16 .* all 13 layers .* 2 bits, expected at most "
        r"0\.1 \([\d,]+ bytes\)\. Raise the target, or take larger groups \(g32\)",
    ):
        quantize(tower, tower.with_name("few.onnx"), replace(INT4, at_most=0.1), calibration=feeds)


def test_layers_named_for_a_target_have_to_reach_it(tower: Path) -> None:
    config = replace(INT4, at_most=0.1, lowered=idle(ir.load(tower))[:1])
    with pytest.raises(QuantizationError, match="with 1 layers lowered to 2 bits, expected at mo"):
        quantize(tower, tower.with_name("few.onnx"), config)


def test_layers_that_are_not_there_are_named(tower: Path) -> None:
    config = replace(INT4, lowered=("layers.9.fc3",))
    with pytest.raises(QuantizationError, match=r"got layers\.9\.fc3, expected layers or tables"):
        quantize(tower, tower.with_name("few.onnx"), config)


def test_a_target_without_calibration_is_refused(tower: Path) -> None:
    with pytest.raises(CalibrationError, match="A size target needs calibration data"):
        quantize(tower, tower.with_name("few.onnx"), replace(INT4, at_most=0.25))
    with pytest.raises(CalibrationError, match="got 0 samples"):
        quantize(
            tower,
            tower.with_name("few.onnx"),
            replace(INT4, at_most=share_at(tower, INT4) - 0.001),
            calibration=lambda: iter(()),
        )


@pytest.mark.parametrize("at_most", [0.0, -0.25, 1.0, 25.0])
def test_a_target_is_a_share_of_fp16(at_most: float) -> None:
    with pytest.raises(QuantizationError, match=f"at_most: got {at_most:g}, expected a share"):
        WeightOnly(at_most=at_most)


@pytest.mark.parametrize("settings", [{"at_most": 0.25}, {"lowered": ("fc1",)}])
def test_the_blocked_form_has_no_target(settings: dict[str, object]) -> None:
    with pytest.raises(QuantizationError, match="got the blocked form, which has no 2 bits"):
        WeightOnly(form="blocked", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("explain", [False, True])
def test_a_variant_names_its_lowered_layers(tower: Path, explain: bool) -> None:
    feed = images(2)
    with open_session(tower) as session:
        expected = session.run(feed)
        spec = role(None, session.inputs, session.outputs, lambda *_: {})
    inputs = role_inputs(spec, feed, feed, (Probe(feed, expected),))
    target = round(100 * share_at(tower, INT4)) - 2
    recipe = parse_recipe(f"int4-g16-at{target}-keep1")
    fp32 = {"portable": tower.with_name("image.onnx"), "onnxruntime": tower}
    builder = VariantBuilder(
        "image_encoder",
        tower.parent,
        fp32,
        spec,
        inputs,
        Calibrator(feeds),
        explain=explain,  # type: ignore[arg-type]
    )
    try:
        built = builder.build(recipe)
    finally:
        builder.close()
    assert share(built.models["onnxruntime"], tower) <= target / 100
    assert built.nodes is not None
    table = load_nodes(built.nodes)
    method = built.recipe.methods["onnxruntime"]
    assert isinstance(method, WeightOnly)
    assert len(method.keep) == 1
    assert method.lowered == tuple(lowered(table.nodes)) != ()
    assert table.samples == 8
    measured = {node.name for node in table.nodes if node.output_error is not None}
    assert measured >= set(method.lowered)
    if explain:
        assert len(measured) == len(table.nodes)
