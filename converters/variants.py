"""The ladder of one role: each variant made, measured against PyTorch and fp32, and described."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedge.bundle.manifest import Layout, Parity, Tolerance
from mmedge.converters.config import Recipe
from mmedge.converters.evaluation import embed
from mmedge.converters.export import (
    OPSET,
    Probe,
    graph_storage_errors,
    measure_parity,
    require_parity,
)
from mmedge.converters.isolated import IsolatedGraph
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.quantize import quantize
from mmedge.specs import Array, Float32Array, Precision

__all__ = ["TOLERANCES", "BuiltVariant", "Calibration", "RoleInputs", "build_variant", "lay_out"]

Calibration = Callable[[], Iterable[Mapping[str, Array]]]

# How far another processor's rounding was allowed to carry the same graph. Integer kernels differ
# between instruction sets in how they saturate, so theirs is wide.
TOLERANCES: dict[Precision, Tolerance] = {
    Precision.FP32: Tolerance(cosine_min=0.9999, max_abs_error=1e-3),
    Precision.FP16: Tolerance(cosine_min=0.999, max_abs_error=1e-2),
    Precision.INT8: Tolerance(cosine_min=0.98, max_abs_error=0.1),
}


@dataclass(frozen=True)
class RoleInputs:
    """What every variant of a role is run on.

    Attributes:
        probes: Inputs of several sizes with the PyTorch module's answers.
        golden: One batch for the golden vectors.
        feeds: Starts the stream of evaluation inputs, one sample each.
        advance: Called after each evaluation sample.
    """

    probes: Sequence[Probe]
    golden: Array
    feeds: Callable[[], Iterable[Array]]
    advance: Callable[[], None]


@dataclass(frozen=True)
class BuiltVariant:
    """A variant on disk and what was measured of it.

    Attributes:
        recipe: How it was made.
        models: ONNX file by layout.
        opset: Of the default domain.
        parity: Against the PyTorch module, over every layout.
        golden: Its answer to the golden batch.
        embeddings: (N, D) of the evaluation samples.
        duration_s: Wall time to make and measure it.
    """

    recipe: Recipe
    models: Mapping[Layout, Path]
    opset: int
    parity: Parity
    golden: Array
    embeddings: Float32Array
    duration_s: float


def lay_out(portable: Path) -> dict[Layout, Path]:
    """Write the layout for ONNX Runtime beside a portable graph, sharing its weights.

    Returns:
        Both files by layout; the portable one alone where no pass changed anything.
    """
    out = portable.with_name(f"{portable.stem}.onnxruntime.onnx")
    with graph_storage_errors(out):
        to_onnxruntime_layout(portable, out)
    return {"portable": portable, "onnxruntime": out}


def build_variant(
    label: str,
    recipe: Recipe,
    folder: Path,
    fp32: Mapping[Layout, Path],
    inputs: RoleInputs,
    calibration: Calibration | None,
) -> BuiltVariant:
    """Make one variant and run it on everything it is to be judged by.

    Args:
        label: What it is called in errors ("image_encoder/int8-dynamic").
        recipe: How to make it.
        folder: Where its files go.
        fp32: The role's fp32 graph by layout.
        inputs: What to run it on.
        calibration: Feeds for the role, or None.

    Raises:
        ConversionError: If it cannot be made, or fp32 disagrees with PyTorch.
        BackendError: If ONNX Runtime cannot run it.
    """
    started = time.monotonic()
    models = _quantize(recipe, folder, fp32, calibration) if recipe.methods else fp32
    runs_here: Layout = "onnxruntime" if "onnxruntime" in models else "portable"
    parities = []
    for layout, model in models.items():
        with IsolatedGraph(model, label) as graph:
            parities.append(measure_parity(label, graph, inputs.probes))
            if not recipe.methods:
                require_parity(f"{label} ({layout})", parities[-1])
            if layout == runs_here:
                golden = graph.run(inputs.golden)
                embeddings = embed(graph, inputs.feeds(), inputs.advance)
    return BuiltVariant(
        recipe=recipe,
        models=models,
        opset=_opset(next(iter(models.values()))),
        parity=_worst(parities),
        golden=golden,
        embeddings=embeddings,
        duration_s=time.monotonic() - started,
    )


def _quantize(
    recipe: Recipe,
    folder: Path,
    fp32: Mapping[Layout, Path],
    calibration: Calibration | None,
) -> dict[Layout, Path]:
    """Write every layout of a variant; what a later one shares with the first is stored once."""
    models: dict[Layout, Path] = {}
    for layout, method in recipe.methods.items():
        first = next(iter(models.values()), None)
        stem = recipe.variant if first is None else f"{recipe.variant}.{layout}"
        models[layout] = folder / f"{stem}.onnx"
        with graph_storage_errors(models[layout]):
            quantize(fp32[layout], models[layout], method, calibration=calibration, share=first)
    return models


def _worst(parities: Sequence[Parity]) -> Parity:
    return Parity(
        max_abs_error=max(parity.max_abs_error for parity in parities),
        cosine_mean=min(parity.cosine_mean for parity in parities),
        cosine_min=min(parity.cosine_min for parity in parities),
        samples=parities[0].samples,
    )


def _opset(model: Path) -> int:
    import onnx

    for entry in onnx.load(model, load_external_data=False).opset_import:
        if entry.domain in {"", "ai.onnx"}:
            return int(entry.version)
    return OPSET
