"""profile(): every figure is there, named, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bundles import edit_manifest, image_encoder_onnx, write_tiny_bundle

from mmedge.bundle import Bundle
from mmedge.errors import (
    BackendUnavailableError,
    BundleError,
    InputError,
    IntegrityError,
    ProfileError,
)
from mmedge.profiling import Budget, Profile, ProfileConfig, profile, stages
from mmedge.profiling import cells as cells_module
from mmedge.profiling.metrics import CellKey
from mmedge.profiling.schema import profile_schema
from mmedge.profiling.timing import Call, Samples
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.axes import dynamic_axes
from mmedge.specs import Axis

QUICK = Budget(seconds=0.0, warmup_seconds=0.0, min_runs=12)
BARE = ProfileConfig(threads=(1,), budget=QUICK, cold_starts=0, stages=False)


def bare(**fields: object) -> ProfileConfig:
    return ProfileConfig.model_validate({**BARE.model_dump(), **fields})


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Everything that can be measured of the tiny bundle, quickly."""
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("full") / "tiny.mmedge")
    steps: list[str] = []
    made = profile(
        bundle,
        ProfileConfig(
            batches=(1, 3),
            threads=(1,),
            budget=QUICK,
            cold_starts=1,
            baseline=":fp32",
            gates=("image_encoder.p90_ms > 1e6", "text_encoder.size_mb > 1e-9"),
        ),
        on_progress=lambda progress: steps.append(f"{progress.step}/{progress.steps}"),
    )
    assert steps == [f"{i}/{len(steps)}" for i in range(len(steps))]
    return made


def test_there_is_a_cell_for_every_combination(full: Profile) -> None:
    keys = [str(CellKey.of(cell)) for cell in full.cells]
    assert len(set(keys)) == len(keys) == 2 * 2 + 2 * 4
    assert "image_encoder.int8-dynamic.b3.t1" in keys
    assert "text_encoder.fp32.b1.t1.s6" in keys
    assert keys[0] == "image_encoder.fp32.b1.t1"


def test_a_cell_reports_its_runs_and_only_supported_figures(
    full: Profile,
) -> None:
    for cell in full.cells:
        gated = (cell.role, cell.batch, cell.threads) == ("image_encoder", 1, 1)
        assert cell.latency.n == (50 if gated else 12)
        assert set(cell.latency.percentiles) == ({"p50", "p90"} if gated else {"p50"})
        assert cell.throughput_per_s == pytest.approx(cell.batch * 1e3 / cell.latency.mean_ms)


def test_placement_is_the_sessions_own(full: Profile) -> None:
    placement = full.cells[0].placement
    assert (placement.backend, placement.device) == ("onnxruntime", "cpu")
    assert placement.engine.startswith("onnxruntime ")
    assert sum(placement.providers.values()) > 0
    assert "CPUExecutionProvider" in placement.summary


def test_every_variant_but_the_baseline_has_a_ratio(full: Profile) -> None:
    for cell in full.cells:
        if cell.variant == "fp32":
            assert cell.baseline is None
        else:
            assert cell.baseline is not None
            assert cell.baseline.name == "fp32"
            assert cell.baseline.ratio.pairs == cell.baseline.latency.n == cell.latency.n
            ratio = cell.baseline.ratio
            assert 0 < ratio.low <= ratio.median <= ratio.high


def test_stages_and_the_end_to_end_call_are_compared(full: Profile) -> None:
    assert [(item.role, item.variant) for item in full.stages] == [
        (role, variant)
        for role in ("image_encoder", "text_encoder")
        for variant in ("fp32", "int8-dynamic")
    ]
    image, text = full.stages[0], full.stages[2]
    assert list(image.stages_ms) == ["decode", "resize", "normalize", "inference", "other"]
    assert list(text.stages_ms) == ["tokenize", "inference", "other"]
    assert image.input.startswith("1280x720 image")
    for item in full.stages:
        measured = [value for name, value in item.stages_ms.items() if name != "other"]
        assert all(value > 0 for value in measured)
        assert item.sum_ms == pytest.approx(sum(measured))
        other = max(item.end_to_end.median_ms - item.sum_ms, 0.0)
        assert item.stages_ms["other"] == pytest.approx(other, abs=1e-5)
        assert min(item.stages_ms.values()) >= 0


def test_stages_that_exceed_the_call_are_noise_and_never_negative(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_parts(calls: Sequence[Call], budget: Budget) -> tuple[Samples, ...]:
        whole, *parts = ([10_000_000] * 10, *([8_000_000] * 10 for _ in calls[1:]))
        return tuple(Samples(each, each) for each in (whole, *parts))

    monkeypatch.setattr(stages, "measure", slow_parts)
    made = profile(tiny_bundle, bare(stages=True))
    for item in made.stages:
        assert item.stages_ms["other"] == 0.0
        assert any("longer than the end-to-end call" in reason for reason in item.noise)


def test_variants_have_size_quality_cold_start_and_memory(full: Profile) -> None:
    assert len(full.variants) == 4
    first, second = full.variants[:2]
    assert (first.cosine_mean, second.cosine_mean) == (1.0, 0.9999)
    assert second.size_bytes > 0
    for item in full.variants:
        assert item.cold_start is not None
        assert item.memory is not None
        assert item.cold_start.first_embedding_ms.median > item.cold_start.load_ms.median > 0
        assert item.memory.peak_bytes >= item.memory.steady_bytes


def test_the_gates_are_applied(full: Profile) -> None:
    assert Counter(gate.failed for gate in full.gates) == {False: 2, True: 2}
    assert {gate.metric for gate in full.gates if gate.failed} == {
        "text_encoder.fp32.size_mb",
        "text_encoder.int8-dynamic.size_mb",
    }


def test_the_machine_is_described(full: Profile) -> None:
    machine = full.machine
    assert machine.cpu_model
    assert 1 <= len(machine.processors_allowed) <= machine.processors_online
    assert machine.harness_overhead_ns > 0
    assert {"python", "numpy", "onnxruntime"} <= machine.versions.keys()


def test_a_profile_is_json_that_reads_back(full: Profile) -> None:
    text = full.model_dump_json()
    assert Profile.model_validate_json(text) == full
    assert '"profile_version":"1.0"' in text


def test_the_published_schema_is_the_models_own() -> None:
    published = Path(__file__).parents[2] / "docs" / "profile.schema.json"
    assert published.read_text(encoding="utf-8") == profile_schema(), (
        "run: python -m mmedge.profiling.schema > docs/profile.schema.json"
    )


class Spy:
    """Opens sessions as ever, and keeps what they were asked."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, SessionOptions]] = []
        self.shapes: list[tuple[int, ...]] = []

    def open_variant(
        self, bundle: Bundle, variant: object, *, backend_name: str, options: SessionOptions
    ) -> Session:
        self.opened.append((backend_name, options))
        session = cells_module_open(bundle, variant, backend_name=backend_name, options=options)
        run = session.run

        def spied(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.shapes.append(next(iter(feed.values())).shape)
            return run(feed)

        session.run = spied
        return session


cells_module_open: object = cells_module.open_variant


def test_an_engine_would_be_built_for_the_largest_batch(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setattr(cells_module, "open_variant", spy.open_variant)
    config = bare(
        roles=("image_encoder",), precisions=("fp32",), batches=(1, 40, 2), backend="fake"
    )
    profile(tiny_bundle, config)
    assert [options.axes for _, options in spy.opened] == [{"batch": Axis(1, 1, 40)}] * 3


def test_the_chosen_variant_runs(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    monkeypatch.setattr(cells_module, "open_variant", spy.open_variant)
    config = bare(
        roles=("text_encoder",),
        precisions=("int8",),
        batches=(2,),
        threads=(3,),
        sequences=(5,),
        backend="fake",
    )
    made = profile(tiny_bundle, config)
    axes = dynamic_axes(tiny_bundle.manifest, "text_encoder")
    assert [str(CellKey.of(cell)) for cell in made.cells] == ["text_encoder.int8-dynamic.b2.t3.s5"]
    assert spy.opened == [("fake", SessionOptions(device="cpu", threads=3, axes=axes))]
    assert set(spy.shapes) == {(2, 5)}
    assert len(spy.shapes) == 1 + 3 + 12  # a look, the warm-up, the runs
    assert made.cells[0].placement.engine == "fake"


def test_too_many_threads_are_warned_of(tiny_bundle: Bundle) -> None:
    made = profile(tiny_bundle, bare(roles=("image_encoder",), threads=(4096,), backend="fake"))
    assert any("4096 threads share" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"precisions": ("int4",)}, ProfileError, "no variant 'int4'.*fp32.*int8-dynamic"),
        ({"roles": ("decoder",)}, InputError, "no role 'decoder'"),
        ({"sequences": (99,)}, ProfileError, "at most 6 tokens"),
        ({"device": "cuda:7"}, BackendUnavailableError, "cuda"),
        ({"backend": "abacus"}, BackendUnavailableError, "Unknown backend: got 'abacus'"),
        ({"gates": ("image_encoder.p95_ms >",)}, ProfileError, "Not a gate"),
        ({"gates": ("image_encoder.ratio > 1",)}, ProfileError, "no figure"),
        ({"gates": ("image_encoder.load_ms > 1",)}, ProfileError, "no figure"),
        ({"baseline": "nowhere"}, ProfileError, "nowhere does not exist"),
    ],
)
def test_an_unmeasurable_metric_is_refused_at_once(
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("something was measured")

    monkeypatch.setattr(cells_module, "measure", never)
    with pytest.raises(error, match=message):
        profile(tiny_bundle, bare(**fields))


def test_a_gate_that_needs_more_runs_than_allowed_is_reported(tiny_bundle: Bundle) -> None:
    budget = QUICK.model_copy(update={"max_runs": 99})
    config = bare(budget=budget.model_dump(), gates=("image_encoder.p95_ms > 1",))
    with pytest.raises(ProfileError, match="needs 100 runs, the limit is 99"):
        profile(tiny_bundle, config)


def test_an_unreadable_bundle_is_reported(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        profile(tmp_path / "none.mmedge", BARE)
    (tiny_bundle.path / "golden.npz").unlink()
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        profile(tiny_bundle.path, BARE)


def other_bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "other.mmedge")


def baselines(made: Profile) -> dict[tuple[str, str], str | None]:
    return {
        (cell.role, cell.variant): cell.baseline.name if cell.baseline else None
        for cell in made.cells
    }


def test_another_bundle_is_compared_variant_by_variant(tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = other_bundle(tmp_path)
    made = profile(tiny_bundle, bare(baseline=str(other.path), roles=("image_encoder",)))
    assert baselines(made) == {
        ("image_encoder", "fp32"): "other.mmedge:fp32",
        ("image_encoder", "int8-dynamic"): "other.mmedge:int8-dynamic",
    }


def test_a_variant_of_another_bundle_can_be_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = other_bundle(tmp_path)
    made = profile(tiny_bundle, bare(baseline=f"{other.path}:int8", roles=("image_encoder",)))
    assert set(baselines(made).values()) == {"other.mmedge:int8-dynamic"}
    with pytest.raises(InputError, match="no variant 'int2'"):
        profile(tiny_bundle, bare(baseline=f"{other.path}:int2"))


def test_an_onnx_file_is_compared_with_the_role_that_takes_its_inputs(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    model = tmp_path / "plain.onnx"
    model.write_bytes(image_encoder_onnx())
    made = profile(tiny_bundle, bare(baseline=str(model), sequences=(4,)))
    assert baselines(made) == {
        ("image_encoder", "fp32"): "plain.onnx",
        ("image_encoder", "int8-dynamic"): "plain.onnx",
        ("text_encoder", "fp32"): None,
        ("text_encoder", "int8-dynamic"): None,
    }


def test_a_baseline_without_a_match_is_reported(tiny_bundle: Bundle, tmp_path: Path) -> None:
    model = tmp_path / "plain.onnx"
    model.write_bytes(image_encoder_onnx())
    with pytest.raises(ProfileError, match=r"plain\.onnx: its inputs.*pixel_values.*of a role"):
        profile(tiny_bundle, bare(baseline=str(model), roles=("text_encoder",)))
    with pytest.raises(ProfileError, match="':fp32' is the only profiled variant"):
        profile(tiny_bundle, bare(baseline=":fp32", precisions=("fp32",)))
    with pytest.raises(InputError, match="no variant 'bf16'"):
        profile(tiny_bundle, bare(baseline=":bf16"))


def test_variants_that_the_backend_has_no_layout_for_are_left_out(tiny_bundle: Bundle) -> None:
    model = tiny_bundle.variant("image_encoder", "int8").models["portable"]
    steps = ("roles", "image_encoder", "variants", 1, "models")
    edit_manifest(tiny_bundle.path, *steps, value={"onnxruntime": model})
    roles = ("image_encoder",)
    made = profile(tiny_bundle.path, bare(backend="openvino", roles=roles))
    assert [(cell.variant, cell.placement.backend) for cell in made.cells] == [("fp32", "openvino")]
    with pytest.raises(ProfileError, match=r"'openvino' runs none of \['int8-dynamic'\] on 'cpu'"):
        profile(tiny_bundle.path, bare(backend="openvino", roles=roles, precisions=("int8",)))


def test_an_onnx_file_is_compared_in_the_backend_of_the_profile(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    baseline = tmp_path / "theirs.onnx"
    baseline.write_bytes(image_encoder_onnx(None))
    made = profile(
        tiny_bundle, bare(backend="openvino", precisions=("fp32",), baseline=str(baseline))
    )
    assert baselines(made)["image_encoder", "fp32"] == "theirs.onnx"
