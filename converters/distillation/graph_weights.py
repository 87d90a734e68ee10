"""Transfer of a pass's weight changes back to the PyTorch module.

Distillation trains the module; what was done to the graph before, such as equalization, has to be
done to the module too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from mmedge.errors import QuantizationError

__all__ = ["with_graph_weights", "with_weights"]


def with_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module with other values of the named parameters, frozen."""
    changed = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
    for name, parameter in changed.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    return changed


def with_graph_weights(module: nn.Module, before: Path, after: Path) -> nn.Module:
    """Return a copy of a module with the weight changes between two graphs.

    The graphs name constants after the module's parameters and hold some of them transposed. What
    has not changed need not be a parameter: the patch convolution's weight is a matrix there.

    Args:
        module: In float; not changed.
        before: ONNX file that was exported from it, in any layout.
        after: ONNX file of the same graph with other numbers.

    Raises:
        QuantizationError: If a constant has changed that is no parameter of the module, as it is or
            transposed.
    """
    old, new = (ir.load(path).graph.initializers for path in (before, after))
    parameters = dict(module.named_parameters())
    weights: dict[str, torch.Tensor] = {}
    for name, value in new.items():
        was, now = (
            None if one is None or one.const_value is None else one.const_value.numpy()
            for one in (old.get(name), value)
        )
        if was is None or now is None or np.array_equal(was, now):
            continue
        held = parameters[name].detach().numpy() if name in parameters else None
        if held is None or not (np.array_equal(was, held) or np.array_equal(was.T, held)):
            raise QuantizationError(
                f"Weights of '{after.name}': '{name}' was changed in the graph, and the PyTorch "
                "module has no parameter of that name with the values it had. Leave out "
                "equalized, or distilled."
            )
        as_held = now if np.array_equal(was, held) else now.T
        weights[name] = torch.from_numpy(np.array(as_held))
    return with_weights(module, weights)
