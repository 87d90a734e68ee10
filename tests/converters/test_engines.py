"""Converted graphs build with TensorRT-RTX, in their precision.

tests/converters/test_engine_forms.py holds the graphs to the form; here they are really built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import write_images
from towers import convolution_network, image_tower, images, text_tower, texts

from mmedge.bundle import open_bundle
from mmedge.converters.config import ConvertConfig
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.request import convert
from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuiltEngine, EngineRequest, count_precisions
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.trt.flavours import installed_version
from mmedge.sessions.preparation import PlanOptions, build_planned, plan_engines
from mmedge.specs import Array, Axis, Precision

pytestmark = pytest.mark.skipif(
    installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)

AXES = {"batch": Axis(1, 1, 8), "sequence": Axis(1, 16, 77)}
TOWERS = {
    "image": (image_tower, lambda seed: images(3, seed)),
    "text": (text_tower, lambda seed: texts(3, 9, seed)),
    "network": (convolution_network, lambda seed: images(3, seed)),
}


def graph(kind: str, recipe: str, folder: Path) -> Path:
    """Make the graph of a recipe from a tower."""
    write, feed = TOWERS[kind]
    source = write(folder / "fp32.onnx")  # type: ignore[operator]
    if recipe == "fp32":
        return source

    def feeds() -> Iterator[dict[str, Array]]:
        return (feed(seed) for seed in range(100, 104))  # type: ignore[operator]

    (method,) = parse_recipe(recipe).methods.values()
    made = folder / f"{recipe}.onnx"
    quantize(source, made, method, calibration=feeds)
    return made


def build(model: Path, *capabilities: str) -> BuiltEngine:
    profiles = shape_profiles(read_onnx_file(model).inputs, [AXES])
    return build_engine(model, EngineRequest("tensorrt-rtx", capabilities, profiles))


def linear_products(folder: Path) -> int:
    """Count the linear layers of the tower that are quantized: all but the one that embeds."""
    import onnx_ir as ir

    return len(find_linears(ir.load(folder / "fp32.onnx").graph)) - 1


@pytest.mark.parametrize(
    ("kind", "recipe", "float_dtype"),
    [
        ("image", "fp32", "fp32"),
        ("text", "fp16", "fp16"),
    ],
)
def test_float_towers(kind: str, recipe: str, float_dtype: str, tmp_path: Path) -> None:
    built = build(graph(kind, recipe, tmp_path), "8.9", "12.0")
    counts = count_precisions(built.layers)
    assert next(iter(counts)) == float_dtype
    assert counts[float_dtype] > 20
    # The normalization of the embedding stays in float32, and no product with it.
    products = [layer for layer in built.layers if layer.kind == "gemm"]
    assert {layer.precision for layer in products} == {float_dtype}


def test_convolutions_are_int8(tmp_path: Path) -> None:
    built = build(graph("network", "int8-static-symmetric-half", tmp_path), "8.9")
    kernels = [layer for layer in built.layers if layer.kind == "correlation"]
    precisions = Counter(layer.precision for layer in kernels)
    # Those that stay in float: the depthwise one and the one of a single place.
    assert precisions == {"int8": 7, "fp16": 2}
    # A residual addition reads int8 values.
    added = [layer for layer in built.layers if any("add_" in node for node in layer.nodes)]
    assert {layer.precision for layer in added} == {"int8"}


@pytest.mark.parametrize(
    ("kind", "recipe", "quantized"),
    [
        ("image", "int8-static-symmetric-half", "int8"),
        ("text", "int8-static-symmetric-half", "int8"),
        ("image", "fp8-half", "fp8"),
        ("image", "int4-g16-blocked-half", "int4"),
    ],
)
def test_quantized_towers(kind: str, recipe: str, quantized: str, tmp_path: Path) -> None:
    model = graph(kind, recipe, tmp_path)
    built = build(model, "any")
    quantized_layers = [layer for layer in built.layers if quantized in layer.constants]
    products = {
        node for layer in quantized_layers for node in layer.nodes if node.endswith("_product")
    }
    assert len(products) == linear_products(tmp_path)
    assert built.warnings == ()  # nothing was folded to float
    counts = count_precisions(built.layers)
    assert counts["fp16"] > 10
    if quantized == "int8":  # q, k and v are one product
        assert len(quantized_layers) < len(products)
        assert any(
            sum("_product" in node for node in layer.nodes) == 3 for layer in quantized_layers
        )
    if quantized == "fp8":  # which "any" has left out
        with pytest.raises(EngineBuildError, match=r"fp8 needs compute capability 8\.9.*got 8\.6"):
            build(model, "8.6", "8.9")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both encoders of a ViT-B/32 with random weights, dynamic batch, from conversion on."""
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import full_size

    monkeypatch.setattr(full_size, "CACHE", tmp_path / "models")
    config = ConvertConfig(
        source=str(full_size.source("b32")),
        out=tmp_path / "clip.mmedge",
        precisions=("fp32", "fp16", "int8"),
        calibration=write_images(tmp_path / "photos", 16, 1, captions=True),
        targets=("tensorrt",),
    )
    bundle = open_bundle(convert(config).path)
    plan = plan_engines(bundle, "tensorrt-rtx", PlanOptions(compute_capabilities=("8.9", "12.0")))
    assert [engine.state for engine in plan.engines] == ["build"] * 6
    for engine in plan.engines:
        built = build_planned(plan, engine)
        assert built.path is not None
        counts = count_precisions(built.record.layers)
        if engine.precision is Precision.INT8:
            quantized_layers = [layer for layer in built.record.layers if "int8" in layer.constants]
            products = {
                node for layer in quantized_layers for node in layer.nodes if "_product" in node
            }
            # q, k, v, output and two of the MLP in 12 blocks, and the patches of an image
            assert len(products) == 72 + (engine.role == "image_encoder")
            assert not [text for text in built.record.warnings if "run in float" in text]
            assert counts["fp16"] > 12
        else:
            assert next(iter(counts)) == engine.precision.value
        size_bytes = bundle.variant(engine.role, engine.variant).size_bytes
        assert 0.9 < len(built.plan) / size_bytes < 1.5
