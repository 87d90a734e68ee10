"""Which engines can be built of a bundle, for what, and why not the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import BackendUnavailableError, EngineBuildError, InputError
from mmedge.runtimes.engines.spec import BuildSettings
from mmedge.runtimes.trt import flavours
from mmedge.runtimes.trt.flavours import installed_version
from mmedge.sessions.axes import dynamic_axes
from mmedge.sessions.choice import engine_backend
from mmedge.sessions.preparation import (
    PlanOptions,
    build_planned,
    plan_engines,
    unbuildable,
)
from mmedge.specs import Axis

needs_rtx = pytest.mark.skipif(
    installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)
ADA = PlanOptions(compute_capabilities=("8.9",))


@pytest.fixture(autouse=True)
def _workstation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TensorRT-RTX at most, no GPU, and nothing in the cache."""
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))

    class NoDevice:
        def __init__(self, _index: int) -> None:
            raise BackendUnavailableError("There is no NVIDIA driver on this machine.")

    real = flavours._installed_module
    monkeypatch.setattr(
        flavours, "_installed_module", lambda name: None if name == "tensorrt" else real(name)
    )
    monkeypatch.setattr("mmedge.runtimes.trt.backend.Device", NoDevice)


def states_of(bundle: Bundle, options: PlanOptions) -> dict[str, tuple[str, str]]:
    plan = plan_engines(bundle, "tensorrt-rtx", options)
    return {engine.label: (engine.state, engine.reason) for engine in plan.engines}


def recipe(bundle: Bundle, **settings: object) -> Bundle:
    """Give image_encoder/int8-dynamic another recipe."""
    steps = ("roles", "image_encoder", "variants", 1, "recipe")
    edit_manifest(bundle.path, *steps, value=settings)
    return open_bundle(bundle.path)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "StaticInt8", "activations": "uint8"}, "unsigned"),
        ({"method": "WeightOnly", "bits": 4, "symmetric": False}, "zero points"),
        ({"method": "WeightOnly", "bits": 8, "symmetric": True}, "folds"),
        ({"method": "StaticInt8", "activations": "int8"}, None),
        ({"method": "WeightOnly", "bits": 4, "symmetric": True}, None),
        ({"method": "Float16"}, None),
        ({}, None),
    ],
)
def test_recipes_that_cannot_be_built(
    settings: dict[str, object], why: str | None, tiny_bundle: Bundle
) -> None:
    bundle = recipe(tiny_bundle, **settings)
    found = unbuildable(bundle.variant("image_encoder", "int8-dynamic"), "tensorrt")
    if why is None:
        assert found is None
    else:
        assert found is not None
        assert why in found
        assert "mmedge convert MODEL --target tensorrt --precision" in found


@pytest.mark.parametrize("method", ["DynamicInt8", "WeightOnly"])
def test_onnxruntimes_own_operators_are_no_engine(method: str, tiny_bundle: Bundle) -> None:
    variant = tiny_bundle.variant("image_encoder", "int8-dynamic")
    model = variant.models["portable"]
    own = variant.model_copy(
        update={"models": {"onnxruntime": model}, "recipe": {"method": method}}
    )
    found = unbuildable(own, "tensorrt")
    assert found is not None
    assert "operators" in found
    assert "--target tensorrt --precision int8" in found


@needs_rtx
def test_a_plan_has_every_variant(tiny_bundle: Bundle) -> None:
    bundle = recipe(tiny_bundle, method="StaticInt8", activations="uint8")
    states = states_of(bundle, ADA)
    assert list(states) == [
        "image_encoder/fp32",
        "image_encoder/int8-dynamic",
        "text_encoder/fp32",
        "text_encoder/int8-dynamic",
    ]
    assert states["image_encoder/fp32"] == ("build", "no engine of this model has been built yet")
    state, reason = states["image_encoder/int8-dynamic"]
    assert state == "refused"
    assert "unsigned" in reason


@needs_rtx
def test_profiles_are_as_load_has_them(tiny_bundle: Bundle) -> None:
    plan = plan_engines(tiny_bundle, "tensorrt-rtx", ADA)
    for engine in plan.engines:
        assert engine.axes == (dynamic_axes(tiny_bundle.manifest, engine.role),)
    text = next(engine for engine in plan.engines if engine.role == "text_encoder")
    assert text.key is not None
    (profile,) = text.key.request.profiles
    assert profile.ranges["input_ids"].max == (32, 6)
    assert text.key.compute_capability == "8.9"
    assert (text.key.cuda, text.key.driver) == ("", "")


@needs_rtx
def test_axes_can_be_given_a_set_for_each_profile(tiny_bundle: Bundle) -> None:
    axes = ({"batch": Axis(1, 1, 1)}, {"batch": Axis(2, 4, 16), "sequence": Axis(4, 4, 4)})
    settings = BuildSettings(workspace_bytes=1 << 20)
    plan = plan_engines(tiny_bundle, "tensorrt-rtx", replace(ADA, axes=axes, settings=settings))
    image, text = (
        next(engine for engine in plan.engines if engine.role == role)
        for role in ("image_encoder", "text_encoder")
    )
    assert image.axes == ({"batch": Axis(1, 1, 1)}, {"batch": Axis(2, 4, 16)})
    usual = dynamic_axes(tiny_bundle.manifest, "text_encoder")["sequence"]
    assert text.axes == (
        {"batch": Axis(1, 1, 1), "sequence": usual},
        {"batch": Axis(2, 4, 16), "sequence": Axis(4, 4, 4)},
    )
    assert image.key is not None
    assert len(image.key.request.profiles) == 2
    assert image.key.request.settings == settings


@needs_rtx
def test_roles_and_precisions_are_chosen_by_name_and_by_kind(tiny_bundle: Bundle) -> None:
    def labels(**chosen: tuple[str, ...]) -> list[str]:
        return list(states_of(tiny_bundle, replace(ADA, **chosen)))  # type: ignore[arg-type]

    assert labels(roles=("text_encoder",), precisions=("int8",)) == ["text_encoder/int8-dynamic"]
    assert labels(precisions=("fp32",)) == ["image_encoder/fp32", "text_encoder/fp32"]
    with pytest.raises(InputError, match=r"no variant 'fp17'.*fp32"):
        labels(precisions=("fp17",))
    with pytest.raises(InputError, match="no role 'audio_encoder'"):
        labels(roles=("audio_encoder",))


@needs_rtx
def test_a_misspelt_axis_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no input has a dynamic axis 'bach'.*batch"):
        states_of(tiny_bundle, replace(ADA, axes=({"bach": Axis(1, 1, 1)},)))


@needs_rtx
def test_any_means_gpus_that_can_run_the_variant(tiny_bundle: Bundle) -> None:
    edit_manifest(
        tiny_bundle.path, "roles", "image_encoder", "variants", 1, "precision", value="fp8"
    )
    plan = plan_engines(
        open_bundle(tiny_bundle.path), "tensorrt-rtx", PlanOptions(compute_capabilities=("any",))
    )
    found = {e.label: e.key.request.compute_capabilities for e in plan.engines if e.key}
    assert "8.6" in found["image_encoder/fp32"]
    assert "7.5" not in found["image_encoder/fp32"]
    assert "8.6" not in found["image_encoder/int8-dynamic"]
    assert "8.9" in found["image_encoder/int8-dynamic"]


@needs_rtx
def test_a_gpu_that_cannot_run_a_variant_refuses_that_one_alone(tiny_bundle: Bundle) -> None:
    edit_manifest(
        tiny_bundle.path, "roles", "image_encoder", "variants", 1, "precision", value="int4"
    )
    states = states_of(open_bundle(tiny_bundle.path), PlanOptions(compute_capabilities=("7.5",)))
    assert states["image_encoder/fp32"][0] == "build"
    state, reason = states["image_encoder/int8-dynamic"]
    assert state == "refused"
    assert "int4 needs compute capability 8.0" in reason


@needs_rtx
def test_an_unknown_capability_is_an_error_for_all(tiny_bundle: Bundle) -> None:
    with pytest.raises(EngineBuildError, match="Jetson Orin"):
        states_of(tiny_bundle, PlanOptions(compute_capabilities=("8.7",)))


@needs_rtx
def test_without_a_gpu_something_has_to_be_named(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA driver.*Name compute"):
        plan_engines(tiny_bundle, "tensorrt-rtx")


def test_a_flavour_that_is_not_installed_is_an_error(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match="TensorRT is not installed"):
        plan_engines(tiny_bundle, "tensorrt")


def test_a_plan_for_elsewhere_needs_neither_library_nor_gpu(tiny_bundle: Bundle) -> None:
    bundle = recipe(tiny_bundle, method="StaticInt8", activations="uint8")
    plan = plan_engines(bundle, "tensorrt", elsewhere=True)
    assert plan.version is None
    assert [engine.state for engine in plan.engines] == [
        "elsewhere",
        "refused",
        "elsewhere",
        "elsewhere",
    ]
    (first, *_) = plan.in_state("elsewhere")
    assert "TensorRT is not installed" in first.reason
    assert first.axes == ({"batch": Axis(1, 1, 8)},)
    with pytest.raises(EngineBuildError, match=r"image_encoder/fp32 cannot be built here"):
        build_planned(plan, first)


@needs_rtx
def test_a_plan_for_another_machine_reports_the_missing_gpu(tiny_bundle: Bundle) -> None:
    plan = plan_engines(tiny_bundle, "tensorrt-rtx", elsewhere=True)
    assert {engine.state for engine in plan.engines} == {"elsewhere"}
    assert "no NVIDIA driver" in plan.engines[0].reason


def test_the_flavour_that_is_taken_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_backend() == "tensorrt-rtx"
    monkeypatch.setattr("mmedge.runtimes.trt.backend.installed_version", {"tensorrt": "10.3.0"}.get)
    assert engine_backend() == "tensorrt"


@needs_rtx
def test_a_cached_engine_is_not_built_again(tiny_bundle: Bundle) -> None:
    options = replace(ADA, roles=("image_encoder",), precisions=("fp32",))
    plan = plan_engines(tiny_bundle, "tensorrt-rtx", options)
    (engine,) = plan.in_state("build")
    phases: list[str] = []
    built = build_planned(plan, engine, lambda phase, _done, _total: phases.append(phase))
    assert built.miss is not None
    assert phases
    assert built.record.label == "tiny.mmedge/image_encoder/fp32.onnx"

    again = plan_engines(tiny_bundle, "tensorrt-rtx", options)
    (cached,) = again.in_state("cached")
    assert cached.reason == ""
    assert build_planned(again, cached).plan == built.plan
    wider = replace(options, axes=({"batch": Axis(1, 1, 64)},))
    (missed,) = plan_engines(tiny_bundle, "tensorrt-rtx", wider).engines
    assert missed.state == "build"
    assert missed.reason != ""
