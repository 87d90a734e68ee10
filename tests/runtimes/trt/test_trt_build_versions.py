"""Build settings for TensorRT 10 and 11, with a fake builder; causes of failed builds."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_graphs import linear_graph

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuildSettings, BuiltEngine, EngineRequest
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.trt import flavours
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.trt.flavours import BuildLog
from mmedge.runtimes.trt.network import quantized_nodes
from mmedge.runtimes.trt.reasons import informative, parser_errors, reason_of
from mmedge.specs import Axis

FLAGS = ("TF32", "REFIT", "WEIGHT_STREAMING", "STRIP_PLAN", "REFIT_IDENTICAL")


def tensor(name: str, dtype: str = "FLOAT", *shape: int) -> Any:
    kind = SimpleNamespace(name=dtype)
    return SimpleNamespace(name=name, dtype=kind, shape=shape, is_shape_tensor=False)


def layer(name: str, kind: str, inputs: list[Any], outputs: list[Any]) -> Any:
    return SimpleNamespace(
        name=name,
        type=SimpleNamespace(name=kind),
        num_inputs=len(inputs),
        num_outputs=len(outputs),
        get_input=inputs.__getitem__,
        get_output=outputs.__getitem__,
    )


def network(*layers: Any) -> Any:
    return SimpleNamespace(
        num_inputs=1,
        num_outputs=1,
        num_layers=len(layers),
        get_input=[tensor("x", "FLOAT", -1, 16)].__getitem__,
        get_output=[tensor("y", "FLOAT", -1, 8)].__getitem__,
        get_layer=layers.__getitem__,
    )


class Recorder:
    """A builder configuration that records its settings."""

    def __init__(self) -> None:
        self.flags, self.limits, self.profiles = {"TF32"}, {}, []  # type: ignore[var-annotated]
        self.timing: Any = None
        self.set_flag, self.clear_flag = self.flags.add, self.flags.discard

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.limits[pool] = limit

    def add_optimization_profile(self, profile: dict[str, Any]) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, blob: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: blob + b"+timed") if blob != b"damaged" else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timing = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timing


@pytest.fixture(params=["10.3.0", "11.4.1"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `tensorrt` whose builder builds nothing; `flags` is what a network was made with."""
    made: Any = ModuleType("tensorrt")
    made.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    typed = {"STRONGLY_TYPED": 1 if request.param.startswith("10") else 0}
    made.NetworkDefinitionCreationFlag = SimpleNamespace(**typed)
    made.BuilderFlag = SimpleNamespace(**{name: name for name in FLAGS})
    made.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    made.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    made.LayerInformationFormat = SimpleNamespace(JSON="json")
    made.ILogger = made.IProgressMonitor = type("Base", (), {"__init__": lambda _: None})
    made.config, made.network = Recorder(), network()

    def create_network(flags: int) -> Any:
        made.flags = flags
        return made.network

    def profile() -> Any:
        return type("Profile", (dict,), {"set_shape": lambda p, n, *s: p.update({n: s})})()

    made.Builder = lambda _: SimpleNamespace(
        create_network=create_network,
        create_builder_config=lambda: made.config,
        create_optimization_profile=profile,
        build_serialized_network=lambda *_: b"plan",
    )
    made.OnnxParser = lambda *_: SimpleNamespace(parse_from_file=lambda _: True)
    inspector = SimpleNamespace(get_engine_information=lambda _: '{"Layers": []}')
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    made.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(flavours, "installed_version", lambda _: request.param)
    return made


def build(folder: Path, timing: Path | None = None, **settings: Any) -> BuiltEngine:
    model = linear_graph(folder / "linear.onnx")
    bounds = [{"batch": Axis(1, 1, 1)}, {"batch": Axis(1, 4, 8)}]
    profiles = shape_profiles(read_onnx_file(model).inputs, bounds)
    request = EngineRequest("tensorrt", profiles=profiles, settings=BuildSettings(**settings))
    return build_engine(model, request, timing_cache=timing)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"workspace_bytes": 5 << 20}, set()),  # TF32, on by default, is off
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"refittable": True}, {"REFIT"}),
        ({"stripped": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"stripped": True, "refittable": True}, {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_settings_passed_to_the_library(
    settings: dict[str, Any], flags: set[str], library: Any, tmp_path: Path
) -> None:
    built = build(tmp_path, **settings)
    assert built.plan == b"plan"
    assert library.flags == (0b10 if flavours.installed_version("").startswith("10") else 0b1)  # type: ignore[union-attr]
    assert library.config.flags == flags
    assert library.config.limits == {"workspace": settings.get("workspace_bytes", 1 << 30)}
    assert library.config.profiles == [
        {"x": ((1, 16), (1, 16), (1, 16))},
        {"x": ((1, 16), (4, 16), (8, 16))},
    ]


def test_a_flag_that_the_library_lacks_is_an_error(library: Any, tmp_path: Path) -> None:
    library.BuilderFlag = SimpleNamespace(TF32="TF32")
    with pytest.raises(EngineBuildError, match=r"TensorRT 1\d\.\S+ has no builder flag WEIGHT"):
        build(tmp_path, weight_streaming=True)


@pytest.mark.usefixtures("library")
def test_a_timing_cache_is_read_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    for before, written in ((None, b"+timed"), (b"old", b"old+timed"), (b"damaged", b"+timed")):
        if before is not None:
            path.write_bytes(before)
        built = build(tmp_path, path)
        assert path.read_bytes() == written
        assert ("timed again" in " ".join(built.warnings)) == (before == b"damaged")
    assert "the timing cache cannot be saved" in build(tmp_path, path / "nowhere").warnings[-1]


VALUES = tensor("values", "INT8", 16, 8)
WEIGHT, MOVED, X = tensor("weight"), tensor("moved"), tensor("x")
QUANTIZED = (
    layer("values", "CONSTANT", [], [VALUES]),
    layer("dequantize", "DEQUANTIZE", [VALUES], [WEIGHT]),
    layer("reshape", "SHUFFLE", [WEIGHT], [MOVED]),
    layer("product", "MATRIX_MULTIPLY", [X, MOVED], [tensor("y")]),
    layer("second", "MATRIX_MULTIPLY", [X, MOVED], [tensor("z")]),
)


def test_quantized_weights_are_found_through_data_movement() -> None:
    assert quantized_nodes(network(*QUANTIZED)) == {"product": "int8", "second": "int8"}
    activations = layer("quantize", "QUANTIZE", [X], [VALUES])
    assert quantized_nodes(network(activations, *QUANTIZED[1:])) == {}


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("Could not find any implementation for node gemm", "larger workspace"),
        ("Requested amount of GPU memory (9 bytes) could not be allocated", "free memory"),
        ("Cannot compile for target(s) sm75: HW-specific datatypes: int4", "another variant"),
        ("cudaError 35: CUDA driver version is insufficient", "check nvidia-smi"),
        ("Something never seen", "never seen"),
    ],
)
def test_the_reason_of_a_failed_build_and_its_fix(message: str, fix: str) -> None:
    log = BuildLog()
    log.errors += ["[checkMacros.cpp::catchCudaError::250] no driver"]
    log.errors += [f"IBuilder: {message} In compileGraph at /_src/optimizer/code.cpp:2012"]
    reason = reason_of(log)
    assert message in reason
    assert fix in reason
    assert "catchCudaError" not in reason
    assert "/_src" not in reason
    assert reason_of(BuildLog()) == "no reason given."
    assert informative(["a.cpp:1: Make sure input ids has Int64 binding.", "b", "b"]) == ("b",)


def test_the_parser_names_node_and_operator() -> None:
    given = [("Plugin not found", "fft", "DFT"), ("No name", "", "NonZero"), ("Other", "", "")]
    errors = [
        SimpleNamespace(
            desc=lambda e=each: e[0],
            node_name=lambda e=each: e[1],
            node_operator=lambda e=each: e[2],
            node=lambda: 7,
        )
        for each in given
    ]
    parser = SimpleNamespace(num_errors=3, get_error=errors.__getitem__)
    expected = "node 'fft' (DFT): Plugin not found; node '7' (NonZero): No name; Other"
    assert parser_errors(parser) == expected
