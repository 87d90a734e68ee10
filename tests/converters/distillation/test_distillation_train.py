"""Distillation: what was trained is what the graph computes, and never worse than the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models.tiny_models import write_clip
from torch import nn

from mmedge.converters.distillation.fake_quantization import FakeQuantized
from mmedge.converters.distillation.train import Distillation, Distilled, distill
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.clip import FAMILY
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import quantizable_linears
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

QUICK = Distillation(steps=12, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RoleSpec]:
    """Of a tiny CLIP whose token table is large enough for int8."""
    folder = write_clip(tmp_path_factory.mktemp("source") / "clip", vocab_size=2560)
    with quiet_libraries():
        source = open_source(str(folder))
        described = FAMILY.describe(source, FAMILY.load(source))
        return {name: make() for name, make in described.roles.items()}


def stream(spec: RoleSpec, feeds: int = 6, size: int = 8) -> Feeds:
    """Return feeds of seeded samples, texts of several lengths."""

    def start() -> Iterator[dict[str, Array]]:
        for seed in range(feeds):
            sizes = {**spec.trace_sizes, "batch": size}
            if "sequence" in sizes:
                sizes["sequence"] = 4 + seed % 2
            yield {name: one.numpy() for name, one in spec.sample(sizes, 50 + seed).items()}

    return start


def layout_of(spec: RoleSpec, folder: Path) -> Path:
    folder.mkdir()
    with quiet_libraries():
        export_role("role", spec, folder / "fp32.onnx")
    to_onnxruntime_layout(folder / "fp32.onnx", folder / "layout.onnx")
    return folder / "layout.onnx"


def ranges_of(spec: RoleSpec, feeds: Feeds) -> dict[str, Range]:
    """Return what each linear layer of a tiny CLIP reads, but for the one that makes embeddings."""
    seen: dict[str, Range] = {}

    def note(name: str, x: torch.Tensor) -> None:
        old = seen.get(name, Range(0.0, 0.0))
        seen[name] = Range(min(old.low, float(x.min())), max(old.high, float(x.max())))

    handles = []
    for name, layer in spec.module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name != "projection":
            known = name if isinstance(layer, nn.Linear) else f"{name}.matrix"
            handles.append(
                layer.register_forward_pre_hook(lambda _, args, known=known: note(known, args[0]))
            )
    torch_outputs(spec.module, feeds, spec.inputs[0].name)
    for handle in handles:
        handle.remove()
    return seen


def torch_outputs(module: nn.Module, feeds: Feeds, name: str) -> Array:
    with torch.no_grad():
        rows = [module(torch.from_numpy(feed[name])).numpy() for feed in feeds()]
    return np.concatenate(rows)


@pytest.mark.parametrize("role", ["image_encoder", "text_encoder"])
def test_the_int8_graph_equals_the_student(
    roles: Mapping[str, RoleSpec], role: str, tmp_path: Path
) -> None:
    spec = roles[role]
    name, feeds = spec.inputs[0].name, stream(spec)
    # Cut, so that what is clamped has to be the same too.
    ranges = {
        layer: Range(one.low / 2, one.high / 2) for layer, one in ranges_of(spec, feeds).items()
    }
    distilled = distill(spec, ranges, feeds, QUICK)
    assert distilled.untrained == ()
    assert set(distilled.ranges) == set(ranges)
    assert distilled.step > 0
    assert distilled.loss_after < distilled.loss_before

    sample = next(iter(feeds()))
    student = FakeQuantized(
        distilled.spec.module, distilled.ranges, [torch.from_numpy(sample[name])]
    )
    expected = torch_outputs(student.module, feeds, name)
    layout = layout_of(distilled.spec, tmp_path / "trained")
    assert {one.name for one in quantizable_linears(ir.load(layout).graph)} == set(ranges)
    for form in ("operators", "qdq"):
        out = tmp_path / f"{form}.onnx"
        quantize(layout, out, StaticInt8(form=form), ranges=distilled.ranges)
        with open_session(out) as session:
            got = np.concatenate([session.run(feed)["embedding"] for feed in feeds()])
        cosines = (got * expected).sum(axis=1)
        assert cosines.min() > 0.9999
    # Without the rounding it is another function: the test above can tell.
    floating = torch_outputs(distilled.spec.module, feeds, name)
    assert (floating * expected).sum(axis=1).min() < 0.9999


class _Small(nn.Module):
    """x (B, 8) -> embedding (B, 4), L2-normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.last(torch.relu(self.first(x))), dim=-1)


RANGES = {"first": Range(-1.0, 1.0), "last": Range(0.0, 1.0)}


@pytest.fixture
def small(roles: Mapping[str, RoleSpec]) -> RoleSpec:
    """A role small enough to be trained in no time; only its module and inputs count here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _Small()
    spec = roles["image_encoder"]
    return replace(spec, module=module, inputs=(replace(spec.inputs[0], name="x"),))


def vectors(count: int, size: int = 7) -> Feeds:
    data = np.random.default_rng(3).normal(0, 1, (count, 8)).astype(np.float32)
    return lambda: [{"x": data[start : start + size]} for start in range(0, count, size)]


def same(one: Distilled, other: Distilled) -> bool:
    pairs = zip(one.spec.module.parameters(), other.spec.module.parameters(), strict=True)
    return one.ranges == other.ranges and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("loss", ["joint-embedding", "contrastive", "both"])
def test_each_loss_brings_the_student_nearer(
    small: RoleSpec, loss: Literal["joint-embedding", "contrastive", "both"]
) -> None:
    config = Distillation(steps=60, batch_size=16, learning_rate=2e-3, loss=loss)
    distilled = distill(small, RANGES, vectors(100), config)
    assert distilled.loss_after < 0.8 * distilled.loss_before
    assert (distilled.samples, distilled.held_back) == (80, 20)
    assert distilled.reason == ""


def test_the_same_seed_gives_the_same_student(small: RoleSpec) -> None:
    data = vectors(100)
    first, again, other = (
        distill(small, RANGES, data, replace(QUICK, seed=seed)) for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def test_how_the_stream_is_cut_does_not_matter(small: RoleSpec) -> None:
    whole, cut = (distill(small, RANGES, vectors(60, size), QUICK) for size in (60, 1))
    assert whole.loss_after == pytest.approx(cut.loss_after, rel=1e-3)


def test_a_training_that_only_harms_gives_the_start_back(small: RoleSpec) -> None:
    data = vectors(100)
    ranges = {"first": Range(-4.0, 4.0), "last": Range(0.0, 4.0)}
    before = {name: one.clone() for name, one in small.module.state_dict().items()}
    distilled = distill(small, ranges, data, replace(QUICK, steps=1, learning_rate=0.9))
    assert distilled.step == 0
    assert distilled.loss_after == distilled.loss_before
    assert "no step of the training was nearer" in distilled.reason
    for name, one in distilled.spec.module.state_dict().items():
        assert torch.equal(one, before[name])
    for name, one in distilled.ranges.items():
        assert one.affine()[1] == ranges[name].affine()[1]


def test_a_start_that_the_first_steps_lead_away_from_is_left_in_smaller_ones(
    small: RoleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = {"first": Range(-4.0, 4.0), "last": Range(0.0, 4.0)}
    config = Distillation(steps=60, batch_size=16, learning_rate=0.1)
    distilled = distill(small, ranges, vectors(100), config)
    assert distilled.step > 0
    assert distilled.loss_after < distilled.loss_before
    monkeypatch.setattr("mmedge.converters.distillation.train._THROWN_BACK", float("inf"))
    assert distill(small, ranges, vectors(100), config).step == 0


def test_the_module_given_is_not_changed(small: RoleSpec) -> None:
    before = {name: one.clone() for name, one in small.module.state_dict().items()}
    distilled = distill(small, RANGES, vectors(50), QUICK)
    assert distilled.spec.module is not small.module
    assert list(small.module.state_dict()) == list(before)
    assert all(torch.equal(one, before[name]) for name, one in small.module.state_dict().items())


def test_each_step_is_reported(small: RoleSpec) -> None:
    calls: list[tuple[int, int]] = []
    distill(small, RANGES, vectors(50), QUICK, advance=lambda *args: calls.append(args))
    assert calls == [(step, 12) for step in range(1, 13)]


def test_a_batch_larger_than_the_data_is_all_of_it(small: RoleSpec) -> None:
    distilled = distill(small, RANGES, vectors(12), replace(QUICK, batch_size=500))
    assert (distilled.samples, distilled.held_back) == (10, 2)


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_samples_are_refused(small: RoleSpec, count: int) -> None:
    with pytest.raises(CalibrationError, match=f"got {count} calibration samples, expected 10"):
        distill(small, RANGES, vectors(count), QUICK)


def test_a_stream_that_ends_differs_from_one_that_restarts(small: RoleSpec) -> None:
    readings = iter([40, 40, 40, 20])

    def start() -> Iterator[dict[str, Array]]:
        yield from vectors(next(readings))()

    with pytest.raises(CalibrationError, match="40 samples when it was read first and 20 now"):
        distill(small, RANGES, start, QUICK)


def test_a_loss_that_is_not_a_number_names_the_step(
    small: RoleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmedge.converters.distillation import train as distillation

    def broken(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        loss = (f - g).square().sum()
        return loss * float("nan") if f.requires_grad else loss

    monkeypatch.setattr(distillation, "joint_embedding_loss", broken)
    with pytest.raises(QuantizationError, match="the loss is nan at step 1"):
        distill(small, RANGES, vectors(50), QUICK)


def test_data_that_is_not_finite_is_refused(small: RoleSpec) -> None:
    with pytest.raises(QuantizationError, match="fp32 model gives NaN or infinite"):
        distill(small, RANGES, lambda: [{"x": np.full((20, 8), np.nan, np.float32)}], QUICK)


def test_a_role_without_ranges_is_refused(small: RoleSpec) -> None:
    with pytest.raises(QuantizationError, match="Nothing to train"):
        distill(small, {}, vectors(50), QUICK)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"temperature": -1.0}],
    ids=str,
)
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=f"Distillation {next(iter(settings))}: got"):
        Distillation(**settings)
