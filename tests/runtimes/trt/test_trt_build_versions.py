"""How engines are built by libraries that are not at hand: TensorRT 10.x and 11.x."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine_graphs import linear_graph
from fake_builder import (
    ERROR,
    VERBOSE,
    WARNING,
    DataType,
    FakeBuilderLibrary,
    Layer,
    OldBuilderFlag,
    ParserError,
    Tensor,
    quantized_layers,
)

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuildSettings, EngineLayer, EngineRequest
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.trt import flavours
from mmedge.runtimes.trt.build import build_engine
from mmedge.specs import Axis

INT8_PRODUCT = {
    "Name": "product",
    "LayerType": "gemm",
    "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
    "Outputs": [{"Name": "y", "Format/Datatype": "Float"}],
    "Metadata": "[ONNX Layer: product]",
}


@pytest.fixture(params=["10.3.0", "11.4.1"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeBuilderLibrary:
    made = FakeBuilderLibrary(request.param)
    made.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(flavours, "installed_version", lambda _: request.param)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return linear_graph(tmp_path / "linear.onnx")


def request_for(model: Path, **settings: object) -> EngineRequest:
    inputs = read_onnx_file(model).inputs
    profiles = shape_profiles(inputs, [{"batch": Axis(1, 1, 1)}, {"batch": Axis(1, 4, 8)}])
    return EngineRequest(
        "tensorrt",
        profiles=profiles,
        settings=BuildSettings(**settings),  # type: ignore[arg-type]
    )


def test_what_is_asked_of_the_library(library: FakeBuilderLibrary, model: Path) -> None:
    built = build_engine(model, request_for(model, workspace_bytes=5 << 20))
    assert built.plan == b"plan of " + library.__version__.encode()
    assert library.network_flags == (0b10 if library.__version__.startswith("10") else 0b1)
    assert library.parsed == [model]
    config = library.config
    assert config.limits == {"workspace": 5 << 20}
    assert config.profiling_verbosity == "detailed"
    assert config.flags == set()  # TF32, which is on by default, is off; no flag of a precision
    assert config.profiles == [
        {"x": ((1, 16), (1, 16), (1, 16))},
        {"x": ((1, 16), (4, 16), (8, 16))},
    ]
    assert [str(spec) for spec in (*built.inputs, *built.outputs)] == [
        "x float32(batch, 16)",
        "y float32(batch, 8)",
    ]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"refittable": True}, {"REFIT"}),
        ({"stripped": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"stripped": True, "refittable": True}, {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_flags_of_the_build(
    settings: dict[str, bool], flags: set[str], library: FakeBuilderLibrary, model: Path
) -> None:
    build_engine(model, request_for(model, **settings))
    assert library.config.flags == flags


def test_a_flag_that_the_library_lacks_is_an_error(
    library: FakeBuilderLibrary, model: Path
) -> None:
    library.BuilderFlag = OldBuilderFlag
    with pytest.raises(EngineBuildError, match=r"TensorRT 1\d\.\S+ .*no flag WEIGHT_STREAMING"):
        build_engine(model, request_for(model, weight_streaming=True))


def test_progress_is_told(library: FakeBuilderLibrary, model: Path) -> None:
    library.steps = 2
    told: list[tuple[str, int, int]] = []
    build_engine(model, request_for(model), progress=lambda *step: told.append(step))
    assert told == [("Building engine", done, 2) for done in (0, 1, 2, 2)]


def test_what_progress_raises_ends_the_build(library: FakeBuilderLibrary, model: Path) -> None:
    def listen(_phase: str, done: int, _total: int) -> None:
        if done:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        build_engine(model, request_for(model), progress=listen)


@pytest.mark.parametrize("stripped", [False, True])
def test_the_layers_are_those_of_the_inspector(
    stripped: bool, library: FakeBuilderLibrary, model: Path
) -> None:
    library.layers = quantized_layers()
    library.inspected = [INT8_PRODUCT]
    built = build_engine(model, request_for(model, stripped=stripped))
    assert built.layers == (
        EngineLayer("product", "gemm", ("int8",), ("fp32",), nodes=("product",)),
    )
    assert built.warnings == ()


def test_the_layers_are_those_of_the_log_where_it_has_them(
    library: FakeBuilderLibrary, model: Path
) -> None:
    library.inspected = None
    library.says = [(VERBOSE, "Layers:\nName: gemm_0, LayerType: gemm, Inputs: []")]
    assert build_engine(model, request_for(model)).layers == (
        EngineLayer("gemm_0", "gemm", (), ()),
    )


def test_int8_that_came_out_in_float_is_an_error(library: FakeBuilderLibrary, model: Path) -> None:
    library.layers = quantized_layers()
    library.inspected = [INT8_PRODUCT | {"Inputs": [{"Name": "x", "Format/Datatype": "Float"}]}]
    with pytest.raises(EngineBuildError, match=r"linear\.onnx: The graph asks for int8"):
        build_engine(model, request_for(model))


def test_an_engine_that_tells_no_layers_is_not_claimed_to_be_int8(
    library: FakeBuilderLibrary, model: Path
) -> None:
    library.layers = quantized_layers()
    library.inspected = None
    built = build_engine(model, request_for(model))
    assert built.layers == ()
    assert "whether int8 is used is not known" in built.warnings[0]


def test_warnings_are_kept_but_for_chatter(library: FakeBuilderLibrary, model: Path) -> None:
    library.says = [
        (WARNING, "ModelImporter.cpp:1071: Make sure input ids has Int64 binding."),
        (WARNING, "kMAX values are not consistent. In operator() at /_src/shapes.cpp:628"),
    ]
    built = build_engine(model, request_for(model))
    assert built.warnings == ("kMAX values are not consistent.",)


def test_no_gpu_is_told(library: FakeBuilderLibrary, model: Path) -> None:
    library.has_gpu = False
    with pytest.raises(EngineBuildError, match="the builder cannot be made: CUDA init") as caught:
        build_engine(model, request_for(model))
    assert "check nvidia-smi" in str(caught.value)


def test_named_capabilities_are_refused_by_a_library_for_its_own_gpu(
    library: FakeBuilderLibrary, model: Path
) -> None:
    request = replace(request_for(model), compute_capabilities=("8.7",))
    with pytest.raises(EngineBuildError, match="for the GPU of its machine alone"):
        build_engine(model, request)
    assert library.parsed == []


def test_the_parser_names_node_and_operator(library: FakeBuilderLibrary, model: Path) -> None:
    library.parser_errors = [
        ParserError("Plugin not found", "fft", "DFT"),
        ParserError("No name here", operator="NonZero"),
        ParserError("Something else"),
    ]
    with pytest.raises(EngineBuildError) as caught:
        build_engine(model, request_for(model))
    message = str(caught.value)
    assert "node 'fft' (DFT): Plugin not found" in message
    assert "node '7' (NonZero): No name here" in message
    assert "; Something else" in message
    assert "--target tensorrt" in message


def test_a_parser_that_says_nothing_is_told_too(library: FakeBuilderLibrary, model: Path) -> None:
    library.parses = False
    with pytest.raises(EngineBuildError, match="the parser failed: no reason given"):
        build_engine(model, request_for(model))


def test_a_refused_profile_is_told(library: FakeBuilderLibrary, model: Path) -> None:
    library.refuses_profiles = True
    with pytest.raises(EngineBuildError, match=r"profile 0 is refused: .*MIN<=OPT<=MAX") as caught:
        build_engine(model, request_for(model))
    assert "Check the bounds" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("Could not find any implementation for node gemm", "larger workspace"),
        ("Requested amount of GPU memory (9 bytes) could not be allocated", "free memory"),
        ("Cannot compile for target(s) sm75: HW-specific datatypes: int4", "another variant"),
        ("cudaError 35: CUDA driver version is insufficient", "check nvidia-smi"),
        ("Something that nobody has seen", "nobody has seen"),
    ],
)
def test_why_a_build_failed_and_what_to_do(
    said: str, way_out: str, library: FakeBuilderLibrary, model: Path
) -> None:
    library.fails = True
    library.says = [
        (ERROR, "[checkMacros.cpp::catchCudaError::250] no driver"),
        (ERROR, f"IBuilder: {said} In compileGraph at /_src/optimizer/code.cpp:2012"),
    ]
    with pytest.raises(EngineBuildError, match="the build failed") as caught:
        build_engine(model, request_for(model))
    message = str(caught.value)
    assert said in message
    assert way_out in message
    assert "catchCudaError" not in message
    assert "/_src" not in message


def test_a_failure_without_a_reason_says_so(library: FakeBuilderLibrary, model: Path) -> None:
    library.fails = True
    with pytest.raises(EngineBuildError, match="the build failed: no reason given"):
        build_engine(model, request_for(model))


def test_an_input_that_gives_shapes_by_its_numbers_is_refused(
    library: FakeBuilderLibrary, model: Path
) -> None:
    library.input.is_shape_tensor = True
    with pytest.raises(EngineBuildError, match=r"\['x'\] are shapes of other tensors"):
        build_engine(model, request_for(model))


def test_an_output_that_numpy_cannot_hold_is_refused(
    library: FakeBuilderLibrary, model: Path
) -> None:
    library.output.dtype = DataType.BF16
    with pytest.raises(EngineBuildError, match="'y' is BF16"):
        build_engine(model, request_for(model))


@pytest.mark.usefixtures("library")
def test_a_timing_cache_is_made_read_and_written(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    build_engine(model, request_for(model), timing_cache=path)
    assert path.read_bytes() == b"+timed"
    build_engine(model, request_for(model), timing_cache=path)
    assert path.read_bytes() == b"+timed+timed"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kept", [b"damaged", b"of another GPU"])
def test_a_timing_cache_that_is_not_taken_is_replaced_and_that_is_told(
    kept: bytes, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(kept)
    built = build_engine(model, request_for(model), timing_cache=path)
    assert path.read_bytes() == b"+timed"
    assert "timed anew" in built.warnings[0]


def test_a_failed_build_leaves_the_timing_cache(
    library: FakeBuilderLibrary, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"kept")
    library.fails = True
    with pytest.raises(EngineBuildError):
        build_engine(model, request_for(model), timing_cache=path)
    assert path.read_bytes() == b"kept"


@pytest.mark.usefixtures("library")
def test_a_timing_cache_that_cannot_be_written_does_not_lose_the_engine(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    built = build_engine(model, request_for(model), timing_cache=tmp_path / "file" / "cache")
    assert built.plan
    assert "the timings are not kept" in built.warnings[0]


def test_codes_are_followed_through_what_moves_them(
    library: FakeBuilderLibrary, model: Path
) -> None:
    """A constant that is dequantized and read by two nodes is asked for in both."""
    layers = quantized_layers()
    moved = layers[2].outputs[0]
    other = Tensor("z", DataType.FLOAT, (-1, 8))
    layers.append(Layer("second", "MATRIX_MULTIPLY", [layers[3].inputs[0], moved], [other]))
    library.layers = layers
    library.inspected = [INT8_PRODUCT]
    built = build_engine(model, request_for(model))
    assert built.warnings == ("1 of 2 nodes in int8 run in float: 'second'.",)


def test_activations_in_codes_alone_are_no_weights(
    library: FakeBuilderLibrary, model: Path
) -> None:
    layers = quantized_layers()
    codes = layers[0].outputs[0]
    layers[0] = Layer("quantize", "QUANTIZE", [Tensor("w", DataType.FLOAT, (16, 8))], [codes])
    library.layers = layers
    assert build_engine(model, request_for(model)).warnings == ()
