"""What every pass owes: run over each that layout.py registers; a new one needs no line here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from towers import (
    continued,
    convolution_network,
    convolution_tower,
    decoder_tower,
    grouped_tower,
    images,
    text_tower,
    texts,
)

from mmedge.converters import passes
from mmedge.converters.passes import ONNXRUNTIME_PASSES, PORTABLE_PASSES
from mmedge.converters.passes.equalization import ScaleChannels
from mmedge.converters.passes.float8 import Float8Linears
from mmedge.converters.passes.int8 import Int8Linears
from mmedge.converters.passes.int8_convolutions import Int8Convolutions
from mmedge.converters.passes.narrowing import ComputeInFloat32, NarrowFloats
from mmedge.converters.passes.weight_only import WeightOnlyLinears
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Axis, TensorSpec

# In the order they are applied; each meets the graph that those before it left.
PASSES = (*PORTABLE_PASSES, *ONNXRUNTIME_PASSES)
TOWERS = {
    "image": convolution_tower,
    "network": convolution_network,
    "text": text_tower,
    "decoder": decoder_tower,
    "grouped": grouped_tower,
}
# Prefill, decode, several tokens after a past; padded on the left where there are several texts.
SIZES = ((1, 4, 0), (3, 5, 0), (1, 1, 6), (3, 1, 4), (2, 3, 2))
FEEDS = {
    "image": [images(1), images(3)],
    "network": [images(1), images(3)],
    "text": [texts(1, 2), texts(3, 9)],
    "decoder": [continued(*sizes) for sizes in SIZES],
    "grouped": [continued(*sizes, kv_heads=2) for sizes in SIZES],
}
# Passes that change outputs by intent; their own tests bound the change.
QUANTIZATION = {
    ComputeInFloat32,
    Float8Linears,
    Int8Convolutions,
    Int8Linears,
    NarrowFloats,
    WeightOnlyLinears,
}
# Exact, but do what their arguments say; test_passes_equalization.py.
NOT_LISTED = {ScaleChannels}


def defined() -> Iterator[type[ir.passes.PassBase]]:
    """Every pass that a module of converters/passes/ exports."""
    for module in pkgutil.iter_modules(passes.__path__, f"{passes.__name__}."):
        loaded = importlib.import_module(module.name)
        for name in loaded.__all__:
            kind = getattr(loaded, name)
            if isinstance(kind, type) and issubclass(kind, ir.passes.PassBase):
                yield kind


def before(step: type[ir.passes.PassBase], tower: str, folder: Path) -> Path:
    """Write the graph that `step` meets."""
    model = ir.load(TOWERS[tower](folder / "tower.onnx"))
    for earlier in PASSES[: PASSES.index(step)]:
        earlier()(model)
    ir.save(model, folder / "before.onnx")
    return folder / "before.onnx"


def test_every_pass_is_registered_in_a_layout() -> None:
    assert set(defined()) - QUANTIZATION - NOT_LISTED == set(PASSES)
    assert len(set(PASSES)) == len(PASSES)


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_pass_keeps_interface_and_outputs(
    step: type[ir.passes.PassBase], tower: str, tmp_path: Path
) -> None:
    source = before(step, tower, tmp_path)
    out = tmp_path / "after.onnx"
    result = step()(ir.load(source))
    ir.save(result.model, out)
    onnx.checker.check_model(out, full_check=True)
    options = SessionOptions(axes={"past": Axis(0, 4, 8)})
    with open_session(source, options=options) as given, open_session(out, options=options) as made:

        def specs(side: tuple[TensorSpec, ...]) -> list[tuple[object, ...]]:
            return [(spec.name, spec.dtype, spec.shape) for spec in side]

        assert specs(made.inputs) == specs(given.inputs)
        assert specs(made.outputs) == specs(given.outputs)
        for feed in FEEDS[tower]:
            expected, got = given.run(feed), made.run(feed)
            for name, values in expected.items():
                np.testing.assert_allclose(got[name], values, atol=4e-6)


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_pass_reports_changes_and_is_idempotent(
    step: type[ir.passes.PassBase], tower: str, tmp_path: Path
) -> None:
    source = before(step, tower, tmp_path)
    untouched = ir.to_proto(ir.load(source)).SerializeToString(deterministic=True)
    first = step()(ir.load(source))
    once = ir.to_proto(first.model).SerializeToString(deterministic=True)
    assert first.modified == (once != untouched)
    second = step()(first.model)
    assert not second.modified
    assert ir.to_proto(second.model).SerializeToString(deterministic=True) == once


@pytest.mark.parametrize("step", PASSES)
def test_a_pass_finds_its_pattern_in_a_tower(
    step: type[ir.passes.PassBase], tmp_path: Path
) -> None:
    """Or the tests above would hold for a pass that never does anything."""
    found = []
    for tower in TOWERS:
        (tmp_path / tower).mkdir()
        found.append(step()(ir.load(before(step, tower, tmp_path / tower))).modified)
    assert any(found)
