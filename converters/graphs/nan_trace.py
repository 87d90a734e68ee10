"""Origin of NaN and infinity, by name, in a PyTorch module or a float graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from mmedge.converters.graphs.probe import ProbeBuilder, open_probe
from mmedge.specs import Array

__all__ = ["first_nan", "first_nan_module"]


def first_nan_module(module: nn.Module, inputs: Sequence[torch.Tensor]) -> str:
    """Return the first submodule whose output is not finite.

    Args:
        module: Gives NaN or infinity for `inputs`.
        inputs: In the order that it takes them.

    Returns:
        The first submodule without parts whose output is not finite, and what of its own weights is
        not; "its output" where every submodule is finite.
    """
    broken: list[str] = []
    with ExitStack() as hooks, torch.inference_mode():
        for name, part in module.named_modules():
            if next(part.children(), None) is None:

                def look(_part: nn.Module, _given: object, given: object, name: str = name) -> None:
                    if isinstance(given, torch.Tensor) and not torch.isfinite(given).all():
                        broken.append(name)

                hooks.callback(part.register_forward_hook(look).remove)
        module(*inputs)
    if not broken:
        return "its output"
    weights = [
        name
        for name, values in module.get_submodule(broken[0]).named_parameters()
        if not torch.isfinite(values).all()
    ]
    stored = f", whose {' and '.join(weights)} holds NaN or infinity" if weights else ""
    return f"'{broken[0]}'{stored}"


def first_nan(model: Path, feed: Mapping[str, Array]) -> str | None:
    """Return the name of a graph's first value that holds NaN, None where none does.

    Infinity alone does not count: masks are made of it.

    Args:
        model: ONNX file in float32 that is known to run.
        feed: Its inputs.

    Raises:
        BackendError: If the engine rejects the graph.
    """
    graph = ir.load(model).graph
    names = [
        value.name or ""
        for node in graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT
    ]
    with open_probe(model, names, _count_nan) as probe:
        found = probe.run(feed)
    return next((name for name in names if found[name]["nan"].item() > 0), None)


def _count_nan(builder: ProbeBuilder, _name: str, value: ir.Value) -> dict[str, ir.Value]:
    nan = builder.node("IsNaN", [value], dtype=ir.DataType.BOOL)
    counted = builder.node("Cast", [nan], {"to": int(ir.DataType.FLOAT)})
    return {"nan": builder.node("ReduceMax", [counted], {"keepdims": 0})}
