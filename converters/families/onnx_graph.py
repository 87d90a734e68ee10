"""ONNX files that mmedge did not export: one graph, its inputs given by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import ModuleKind
from mmedge.bundle.tensors import CallerFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.specs import Axis, Compare, TensorSpec

__all__ = ["FAMILY", "draw_inputs", "usual_axes"]

# Bounds of axes that a file does not bound.
_BATCH = Axis(1, 1, 8)
_OTHER = Axis(1, 16, 512)


class OnnxGraph:
    """ONNX files, of kind `module`; the file's own fp32 outputs are the reference."""

    name = "onnx"

    def matches(self, source: Source) -> bool:
        """Return whether a source is an ONNX file."""
        return source.graph is not None

    def load(self, source: Source) -> nn.Module | None:  # noqa: ARG002
        """Return None: the graph is the model."""
        return None

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:  # noqa: ARG002
        """Describe the graph.

        Raises:
            SourceError: If it has no inputs or no outputs, or is in half precision.
        """
        path = source.graph
        assert path is not None  # noqa: S101, matches has seen it
        file = read_onnx_file(path)
        if not file.inputs or not file.outputs:
            raise SourceError(f"{path}: has no inputs or no outputs. Export it again.")
        if file.has_fp16 or file.signed_int8 or file.has_fp8:
            raise SourceError(
                f"{path}: is quantized or in half precision already. Pass the fp32 model that it "
                "was made from."
            )
        return ModelSpec(
            kind=ModuleKind(),
            tasks=(),
            roles={"module": lambda: _role(path, file.inputs, file.outputs)},
        )


def _role(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> RoleSpec:
    axes = usual_axes(inputs)
    return RoleSpec(
        module=None,
        graph=path,
        inputs=inputs,
        outputs=outputs,
        axes=axes,
        sample=lambda sizes, seed: draw_inputs(inputs, sizes, seed),
        trace_sizes={name: min(2, axis.max) for name, axis in axes.items()},
        proof_sizes=({name: max(1, axis.min) for name, axis in axes.items()},),
        feeds={item.name: CallerFeed() for item in inputs},
        compare={item.name: Compare.VALUES for item in outputs},
    )


def usual_axes(inputs: tuple[TensorSpec, ...]) -> dict[str, Axis]:
    """Return bounds for the dynamic axes of inputs: the first of an input is its batch."""
    axes: dict[str, Axis] = {}
    for item in inputs:
        for position, size in enumerate(item.shape):
            if isinstance(size, str):
                axes.setdefault(size, _OTHER if position else _BATCH)
    return axes


def draw_inputs(
    inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int
) -> dict[str, torch.Tensor]:
    """Return random inputs: floats of normal distribution, integers 0 or 1.

    Args:
        inputs: Their specs.
        sizes: Sizes of the dynamic axes, by name.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, torch.Tensor] = {}
    for item in inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in item.shape]
        floating = item.dtype.kind == "f"
        array = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        drawn[item.name] = torch.from_numpy(np.asarray(array).astype(item.dtype))
    return drawn


FAMILY = OnnxGraph()
