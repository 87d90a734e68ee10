"""Roles fed with arrays by their caller, and what their variants are run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmedge.bundle.kinds import ModuleKind
from mmedge.bundle.tensors import CallerFeed
from mmedge.converters.data.datasets import Dataset
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.tensors import Tensors
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.graphs.parity import Probe
from mmedge.converters.variants.builder import RoleInputs
from mmedge.specs import Array, Axis, Compare, TensorSpec

__all__ = ["fed_by_caller", "role", "role_inputs"]


def role(
    module: nn.Module | None,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]],
    **settings: object,
) -> RoleSpec:
    """Return a role; its outputs are compared by rows by default."""
    known: dict[str, object] = {
        "axes": {"batch": Axis(1, 1, 8)},
        "trace_sizes": {"batch": 2},
        "proof_sizes": ({"batch": 1}, {"batch": 3}),
        "compare": {spec.name: Compare.ROWS for spec in outputs},
        "feeds": {spec.name: CallerFeed() for spec in inputs},
    }
    return RoleSpec(module, inputs, outputs, sample=sample, **{**known, **settings})  # type: ignore[arg-type]


def fed_by_caller(spec: RoleSpec) -> RoleSpec:
    """Return a role whose inputs are arrays."""
    return replace(spec, feeds={item.name: CallerFeed() for item in spec.inputs})


def role_inputs(
    spec: RoleSpec,
    rows: Mapping[str, Array],
    golden: Mapping[str, Array],
    probes: tuple[Probe, ...],
) -> RoleInputs:
    """Return what variants of a role are run on, with `rows` as held-out data."""
    model = ModelSpec(ModuleKind(), (), {"module": lambda: spec})
    data = Dataset("held-out", arrays=rows)
    evaluation = Tensors(Subject(model, {}, Path(), data, "{}", 0))
    return RoleInputs(probes, golden, evaluation, {}, lambda _: lambda: None)
