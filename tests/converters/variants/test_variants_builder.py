"""Variants as they are built: what distillation starts from, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models.tiny_models import write_clip
from roles import fed_by_caller, role_inputs

from mmedge.converters.distillation.graph_weights import with_weights
from mmedge.converters.distillation.train import Distillation, Distilled
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.clip import FAMILY
from mmedge.converters.graphs.export import export_role
from mmedge.converters.graphs.parity import probe_role
from mmedge.converters.methods.recipes import FP32, parse_recipe
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.statistics.collect import Feeds
from mmedge.converters.variants.builder import VariantBuilder, lay_out
from mmedge.specs import Array


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RoleSpec:
    """The image encoder of a tiny CLIP whose channels are as uneven as powers of two can mend."""
    folder = write_clip(tmp_path_factory.mktemp("source") / "clip")
    with quiet_libraries():
        source = open_source(str(folder))
        known = FAMILY.describe(source, FAMILY.load(source)).roles["image_encoder"]()
    assert known.module is not None
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: parameter * torch.randn(parameter.shape, generator=generator).exp2()
        + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in known.module.named_parameters()
        if parameter.ndim == 1
    }
    return fed_by_caller(replace(known, module=with_weights(known.module, drawn)))


reported_steps: list[tuple[str, int, int]] = []


@pytest.fixture
def builder(spec: RoleSpec, tmp_path: Path) -> Iterator[VariantBuilder]:
    name = spec.inputs[0].name
    samples = [spec.sample({**spec.trace_sizes, "batch": 4}, seed)[name].numpy() for seed in (1, 2)]

    def calibration() -> Iterator[dict[str, Array]]:
        yield from ({name: sample} for sample in samples)

    with quiet_libraries():
        export_role("image_encoder", spec, tmp_path / "fp32.onnx")
        inputs = role_inputs(spec, {name: samples[1]}, {name: samples[0]}, probe_role(spec))
        made = VariantBuilder(
            "image_encoder",
            tmp_path,
            lay_out(tmp_path / "fp32.onnx"),
            spec,
            inputs,
            calibration,
            report=lambda *step: reported_steps.append(step),
        )
        reported_steps.clear()
        yield made
        made.close()


def taught_nothing(
    spec: RoleSpec,
    ranges: dict[str, Range],
    calibration: Feeds,
    config: Distillation,
    **settings: object,
) -> Distilled:
    """Return the student as it starts."""
    assert settings["teacher"] is not None
    settings["advance"](3, 9)  # type: ignore[operator]
    return Distilled(spec, ranges, 1.0, 0.5, step=1, samples=8, held_back=2, untrained=())


@pytest.mark.parametrize("start", ["int8-static", "int8-static-equalized"])
def test_a_student_starts_with_the_weights_of_its_recipe(
    start: str, builder: VariantBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmedge.converters.variants.builder.distill", taught_nothing)
    plain = builder.build(parse_recipe(start))
    before = {path.name for path in tmp_path.iterdir()}
    student = builder.build(parse_recipe(f"{start}-distilled"))
    assert reported_steps == [(f"Train image_encoder {start}-distilled", 3, 9)]
    assert (student.recipe.distilled, student.recipe.variant) == (True, f"{start}-distilled")
    assert student.models.keys() == plain.models.keys() == {"onnxruntime", "portable"}
    np.testing.assert_array_equal(student.collected["embedding"], plain.collected["embedding"])
    assert student.parity == plain.parity
    new = {path.name for path in tmp_path.iterdir()} - before
    assert {name.removeprefix(f"{start}-distilled") for name in new} == {
        ".onnx",
        ".onnx.data",
        ".portable.onnx",
        ".nodes.json",
    }


def test_equalization_is_what_makes_the_two_starts_differ(builder: VariantBuilder) -> None:
    """Otherwise the test above could not detect a student that starts from the wrong one."""
    plain, equalized = (
        ir.load(builder.build(parse_recipe(name)).models["onnxruntime"]).graph.initializers
        for name in ("int8-static", "int8-static-equalized")
    )
    different = [
        name
        for name, value in plain.items()
        if value.const_value is not None
        and equalized[name].const_value is not None
        and not np.array_equal(value.const_value.numpy(), equalized[name].const_value.numpy())
    ]
    assert len(different) > 10


def test_graphs_whose_ranges_are_of_a_batch_run_one_by_one(
    builder: VariantBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = builder.inputs.evaluation
    monkeypatch.setattr(type(evaluation), "batch", 3)
    plain, sizes, steps = evaluation.collect, [], []

    def collect(
        spec: RoleSpec,
        run: Callable[..., Mapping[str, Array]],
        feeds: Iterable[Mapping[str, Array]],
        advance: Callable[[], None],
        reference: Mapping[str, Mapping[str, Array]],
    ) -> dict[str, Array]:
        read = list(feeds)
        sizes.append([len(array) for feed in read for array in feed.values()])
        count: list[None] = []
        made = plain(spec, run, read, lambda: count.append(None), reference)
        steps.append(len(count))
        return made

    monkeypatch.setattr(evaluation, "collect", collect)
    for recipe in (FP32, parse_recipe("int8-dynamic"), parse_recipe("int8-static")):
        builder.build(recipe)
    assert sizes == [[3, 1], [1, 1, 1, 1], [3, 1]]
    assert steps == [4, 4, 4]
