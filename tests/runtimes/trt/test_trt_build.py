"""Engines of small graphs, built by TensorRT-RTX itself, which needs no GPU for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_states
from engine_graphs import Net, convolutional_net, decoder_step, fusion_head, linear_graph
from onnx import TensorProto, helper

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import (
    BuildHost,
    BuildSettings,
    BuiltEngine,
    EngineRequest,
    ShapeProfile,
    ShapeRange,
    count_precisions,
)
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.trt.flavours import installed_version
from mmedge.specs import Axis

pytestmark = pytest.mark.skipif(
    installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)

BATCH: dict[str, Axis] = {"batch": Axis(1, 1, 8)}
AXES: dict[str, Axis] = BATCH | {
    "sequence": Axis(1, 1, 16),
    "past": Axis(1, 8, 32),
    "total": Axis(2, 9, 48),
    "patches": Axis(1, 50, 200),
}


def request_for(
    model: Path,
    *capabilities: str,
    axes: tuple[Mapping[str, Axis], ...] = (AXES,),
    **settings: object,
) -> EngineRequest:
    return EngineRequest(
        "tensorrt-rtx",
        capabilities or ("8.9",),
        shape_profiles(read_onnx_file(model).inputs, axes),
        BuildSettings(**settings),  # type: ignore[arg-type]
    )


def build(model: Path, *capabilities: str) -> BuiltEngine:
    return build_engine(model, request_for(model, *capabilities))


def nodes_in(built: BuiltEngine, dtype: str) -> set[str]:
    """Nodes in layers that hold a constant of a dtype."""
    return {node for layer in built.layers if dtype in layer.constants for node in layer.nodes}


def test_a_convolutional_net_in_float32(tmp_path: Path) -> None:
    built = build(convolutional_net(tmp_path / "net.onnx", quantized=False))
    assert set(count_precisions(built.layers)) == {"fp32"}
    assert [str(spec) for spec in (*built.inputs, *built.outputs)] == [
        "image float32(batch, 3, 32, 32)",
        "features float32(batch, 8)",
    ]
    assert len(built.plan) > 10_000
    assert built.duration_s > 0


def test_a_convolutional_net_in_int8(tmp_path: Path) -> None:
    model = convolutional_net(tmp_path / "net.onnx", quantized=True)
    built = build(model)
    convolutions = {n.name for n in onnx.load(model).graph.node if n.op_type == "Conv"}
    assert len(convolutions) == 2
    assert convolutions <= nodes_in(built, "int8")
    assert not [text for text in built.warnings if "run in float" in text]


def test_a_decoder_step_with_a_past(tmp_path: Path) -> None:
    built = build(decoder_step(tmp_path / "decoder.onnx"), "8.9", "12.0")
    assert count_precisions(built.layers)["fp16"] > 10
    assert "fp32" not in count_precisions(built.layers)
    shapes = {spec.name: spec.shape for spec in (*built.inputs, *built.outputs)}
    assert shapes["past.1.key"] == ("batch", 4, "past", 8)
    assert shapes["present.1.value"] == ("batch", 4, "total", 8)
    assert shapes["input_ids"] == ("batch", "sequence")


def test_a_fusion_head_of_two_towers(tmp_path: Path) -> None:
    built = build(fusion_head(tmp_path / "head.onnx"))
    assert count_precisions(built.layers)["fp16"] > 5
    assert [spec.name for spec in built.inputs] == ["tokens", "patches"]


def test_several_profiles_and_capabilities(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx", external=True)
    narrow: dict[str, Axis] = {"batch": Axis(1, 1, 1)}
    one = build_engine(model, request_for(model, axes=(narrow,)))
    both = build_engine(model, request_for(model, "8.9", "12.0", axes=(narrow, AXES)))
    assert both.plan != one.plan
    assert both.inputs == one.inputs


@pytest.mark.parametrize("name", toy_states.TOYS)
def test_graphs_with_state_build_with_an_empty_past(name: str, tmp_path: Path) -> None:
    toy = toy_states.TOYS[name]
    model = toy.save(tmp_path / "m.onnx")
    built = build_engine(model, request_for(model, axes=(toy_states.AXES,)))
    assert built.inputs == toy.inputs
    assert built.outputs == toy.outputs


def test_a_graph_without_dynamic_axes_needs_no_profile(tmp_path: Path) -> None:
    net = Net()
    net.node("MatMul", "x", net.weight(16, 8), out="y")
    model = net.save(tmp_path / "fixed.onnx", {"x": (4, 16)}, {"y": (4, 8)})
    assert build_engine(model, EngineRequest("tensorrt-rtx", ("8.9",))).inputs[0].shape == (4, 16)


def test_weights_can_be_streamed(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    assert build_engine(model, request_for(model, weight_streaming=True)).plan


@pytest.mark.parametrize("setting", ["refittable", "stripped"])
def test_stripped_and_refittable_engines_need_a_gpu(setting: str, tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    with pytest.raises(EngineBuildError, match="only on a machine with a GPU"):
        build_engine(model, request_for(model, **{setting: True}))


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    steps: list[tuple[str, int, int]] = []
    build_engine(model, request_for(model), progress=lambda *step: steps.append(step))
    phases = {phase for phase, _, _ in steps}
    assert len(phases) > 3
    first, _, total = steps[0]
    assert steps[-1] == (first, total, total)
    assert all(0 <= done <= total for _, done, total in steps)


def test_an_interrupt_ends_the_build(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")

    def interrupt(_phase: str, done: int, _total: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # until it is heard

    with pytest.raises(KeyboardInterrupt):
        build_engine(model, request_for(model), progress=interrupt)
    assert build(model).plan  # and the library builds on


def test_int8_that_would_be_folded_to_float_is_an_error(tmp_path: Path) -> None:
    """TensorRT has no kernels for blocks of 8 bits, and silently dequantizes them."""
    net = Net("float16", opset=21)
    quantized = net.constant(net.rng.integers(-127, 128, (64, 32)), np.int8)
    scales = net.constant(np.full((4, 32), 0.01))
    weight = net.node("DequantizeLinear", quantized, scales, axis=0, block_size=16)
    net.node("MatMul", "x", weight, out="y")
    model = net.save(tmp_path / "m.onnx", {"x": ("batch", 64)}, {"y": ("batch", 32)})
    with pytest.raises(EngineBuildError, match=r"m\.onnx: The graph has 1 nodes in int8") as e:
        build(model)
    assert "'matmul_1'" in str(e.value)


def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path) -> None:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")
    ]
    nodes = [helper.make_node("Quantum", ["x"], ["y"], "the_odd_one", domain="com.example")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    graph = helper.make_graph(nodes, "odd", values[:1], values[1:])
    model = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), model)
    with pytest.raises(EngineBuildError, match=r"node 'the_odd_one' \(Quantum\)") as caught:
        build(model)
    assert "--target tensorrt" in str(caught.value)


def test_unsigned_activations_are_refused_with_the_node(tmp_path: Path) -> None:
    net = Net()
    step, zero = net.constant(0.1), net.constant(128, np.uint8)
    quantized = net.node("QuantizeLinear", "x", step, zero)
    net.node(
        "MatMul", net.node("DequantizeLinear", quantized, step, zero), net.weight(16, 8), out="y"
    )
    model = net.save(tmp_path / "m.onnx", {"x": ("batch", 16)}, {"y": ("batch", 8)})
    with pytest.raises(EngineBuildError, match=r"node 'quantizelinear_0' \(QuantizeLinear\)"):
        build(model)


def test_external_data_is_found_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linear_graph(tmp_path / "linear.onnx", external=True)
    monkeypatch.chdir("/")
    assert build(model).plan


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, r"has the inputs \[\], expected \['x'\]"),
        ({"z": ((1, 16), (1, 16), (1, 16))}, r"has the inputs \['z'\]"),
        ({"x": ((1, 4), (1, 8), (1, 16))}, r"has \(1, 4\) for 'x'"),
        ({"x": ((1,), (1,), (1,))}, r"has \(1,\) for 'x'"),
        ({"x": ((1, 16), (1, 16), (1 << 33, 16))}, "up to 2147483647"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    ranges: dict[str, tuple[tuple[int, ...], ...]], message: str, tmp_path: Path
) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    profile = ShapeProfile({name: ShapeRange(*shapes) for name, shapes in ranges.items()})
    with pytest.raises(EngineBuildError, match=message):
        build_engine(model, EngineRequest("tensorrt-rtx", ("8.9",), (profile,)))


def test_dynamic_axes_need_a_profile(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    with pytest.raises(EngineBuildError, match=r"axes \['batch'\] are dynamic"):
        build_engine(model, EngineRequest("tensorrt-rtx", ("8.9",)))


def test_contradictory_shapes_are_refused(tmp_path: Path) -> None:
    net = Net()
    net.node("Add", "x", "z", out="y")
    model = net.save(tmp_path / "m.onnx", {"x": ("a", 4), "z": ("b", 4)}, {"y": ("c", 4)})
    axes: dict[str, Axis] = {"a": Axis(2, 2, 4), "b": Axis(3, 3, 4)}
    with pytest.raises(EngineBuildError, match=r"add_0: .*2 != 3") as caught:
        build_engine(model, request_for(model, axes=(axes,)))
    assert "Check the bounds" in str(caught.value)


def test_float32_products_for_compute_capability_7_5_are_refused(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    with pytest.raises(EngineBuildError, match=r"'matmul_0' is one.*8\.0"):
        build(model, "7.5", "8.9")
    assert build(fusion_head(tmp_path / "head.onnx"), "7.5").plan  # in fp16


def test_building_for_this_machine_needs_a_gpu(tmp_path: Path) -> None:
    model = linear_graph(tmp_path / "linear.onnx")
    request = EngineRequest("tensorrt-rtx", (), request_for(model).profiles)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineBuildError, match="none can be used: check nvidia-smi"):
        build_engine(model, request)


KILLED = """
import os, signal, sys
from pathlib import Path
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.engines.spec import BuildHost, EngineRequest
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.specs import Axis

model, cache = Path(sys.argv[1]), EngineCache(Path(sys.argv[2]))
profiles = shape_profiles(read_onnx_file(model).inputs, [{"batch": Axis(1, 1, 8)}])
request = EngineRequest("tensorrt-rtx", ("8.9",), profiles)

def die(phase, done, total):
    if phase == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

key = cache.key_for(model, request, BuildHost("1"))
cache.get_or_build(key, lambda: build_engine(model, request, progress=die))
"""


def test_a_killed_build_leaves_nothing(tmp_path: Path) -> None:
    model, folder = linear_graph(tmp_path / "linear.onnx"), tmp_path / "engines"
    command = [sys.executable, "-c", KILLED, str(model), str(folder), "Optimizing graph"]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir() if path.suffix in (".plan", ".json")] == []

    cache = EngineCache(folder)
    request = request_for(model, axes=(BATCH,))
    key = cache.key_for(model, request, BuildHost("1"))
    found = cache.get_or_build(key, lambda: build_engine(model, request))
    assert found.path is not None
    assert found.path.read_bytes() == found.plan
    assert cache.load(key).plan == found.plan
