"""Taps: hidden states of an encoder as further outputs, which heads read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import EmbeddingKind
from mmedge.bundle.kinds.embedding import EMBEDDING, TapEntry
from mmedge.converters.families.base import ModelSpec, RoleSpec, TapPoint
from mmedge.errors import ConversionError
from mmedge.specs import Compare, TensorSpec, did_you_mean

__all__ = ["block_tap", "ends_at", "unpadded", "with_taps"]

_NAME = re.compile(r"([a-z_]+)(?:@(\d+))?")


class _Tapped(nn.Module):
    """A module with the states between its blocks as further outputs, and their masks.

    Args:
        inner: The module.
        taps: Where each is read, and behind how many blocks.
    """

    def __init__(self, inner: nn.Module, taps: Sequence[tuple[TapPoint, int]]) -> None:
        super().__init__()
        self.inner = inner
        self._taps = tuple(taps)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for at, (point, count) in enumerate(self._taps):
            blocks = cast(nn.ModuleList, self.inner.get_submodule(point.blocks))
            if count < len(blocks):
                handles.append(
                    blocks[count].register_forward_pre_hook(_keep_input(seen, at), with_kwargs=True)
                )
            else:
                handles.append(blocks[-1].register_forward_hook(_keep_output(seen, at)))
        try:
            outputs = self.inner(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        made = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        for at, (point, _) in enumerate(self._taps):
            made.append(seen[at][:, point.skip :])
            if point.mask is not None:
                made.append(point.mask(*inputs))
        return tuple(made)


def _keep_input(seen: dict[int, torch.Tensor], at: int) -> Any:  # noqa: ANN401, a hook of torch
    def keep(_: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen[at] = args[0] if args else named["hidden_states"]

    return keep


def _keep_output(seen: dict[int, torch.Tensor], at: int) -> Any:  # noqa: ANN401, a hook of torch
    def keep(_: nn.Module, __: object, output: Any) -> None:  # noqa: ANN401
        seen[at] = output if isinstance(output, torch.Tensor) else output[0]

    return keep


def ends_at(token: int) -> Any:  # noqa: ANN401, a callable of tensors
    """Return a function from input_ids (B, S), or a mask beside them, to a bool mask (B, S).

    Without a mask among the inputs, a text ends with the first such token.
    """

    def mask(ids: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        if given is not None:
            return given != 0
        ends = ids == token
        places = torch.arange(ids.shape[1])
        last = torch.where(ends.any(-1), ends.int().argmax(-1), ids.shape[1] - 1)
        return places <= last[:, None]

    return mask


def unpadded(pad: int) -> Any:  # noqa: ANN401, a callable of tensors
    """Return a function from input_ids (B, S) to the mask of what is no padding (B, S)."""
    return lambda ids: ids != pad


def block_tap(
    module: nn.Module,
    blocks: str,
    shape: tuple[int | str, int],
    *,
    skip: int = 0,
    mask: Any = None,  # noqa: ANN401, a callable of tensors
) -> dict[str, TapPoint]:
    """Describe the tap of a tower: `tokens` where it has a mask, else `patches`.

    Args:
        module: The role's module.
        blocks: Path of the list of its blocks.
        shape: (tokens, width) of the states; tokens may be an axis.
        skip: Leading states that are no patch: a class token.
        mask: Makes the mask (B, S) bool from the module's inputs.

    Returns:
        By name; empty where the module has no such blocks.
    """
    try:
        found = module.get_submodule(blocks)
    except AttributeError:
        return {}
    point = TapPoint(blocks, len(cast(nn.ModuleList, found)), shape, skip, mask)
    return {"patches" if mask is None else "tokens": point}


def with_taps(model: ModelSpec, wanted: Sequence[str]) -> ModelSpec:
    """Return a model whose encoders have the wanted taps as outputs.

    Args:
        model: The model.
        wanted: Names of taps: "patches" and "tokens" are the states before an encoder's last block,
            "patches@2" those behind its second; "embedding" is always there.

    Raises:
        ConversionError: If the model has no such tap.
    """
    names = [name for name in dict.fromkeys(wanted) if name != EMBEDDING]
    if not names:
        return model
    offered = {
        name: (role, point)
        for role, make in model.roles.items()
        for name, point in make().taps.items()
    }
    chosen: dict[str, tuple[str, TapPoint, int]] = {}
    for wish in names:
        match = _NAME.fullmatch(wish)
        if match is None or match[1] not in offered or not isinstance(model.kind, EmbeddingKind):
            raise ConversionError(
                f"--taps: got '{wish}', expected some of {', '.join([EMBEDDING, *offered])}; a "
                f"number of blocks may follow, as in patches@2.{did_you_mean(wish, offered)}"
            )
        role, point = offered[match[1]]
        count = int(match[2]) if match[2] else point.count - 1
        if not 1 <= count <= point.count:
            raise ConversionError(
                f"--taps: {wish}: the {role} has {point.count} blocks, expected 1 to "
                f"{point.count} after the @, and two blocks or more without it."
            )
        chosen[wish] = (role, point, count)
    masks = {
        name: f"{name}_mask" if point.mask is not None else None
        for name, (_, point, _) in chosen.items()
    }
    taps = {
        name: TapEntry(role=role, blocks=count, mask=masks[name])
        for name, (role, _, count) in chosen.items()
    }
    return replace(
        model,
        kind=model.kind.model_copy(update={"taps": taps}),
        roles={role: partial(_tapped, make, role, chosen) for role, make in model.roles.items()},
    )


def _tapped(
    make: Callable[[], RoleSpec], role: str, chosen: Mapping[str, tuple[str, TapPoint, int]]
) -> RoleSpec:
    spec = make()
    own = {name: (point, n) for name, (owner, point, n) in chosen.items() if owner == role}
    if not own:
        return spec
    assert spec.module is not None  # noqa: S101, only modules have taps
    made: dict[str, Compare] = {}
    outputs: list[TensorSpec] = []
    for name, (point, _) in own.items():
        outputs.append(TensorSpec(name, np.dtype(np.float32), ("batch", *point.shape)))
        made[name] = Compare.ROWS
        if point.mask is not None:
            shape = ("batch", point.shape[0])
            outputs.append(TensorSpec(f"{name}_mask", np.dtype(np.bool_), shape))
            made[f"{name}_mask"] = Compare.VALUES
    return replace(
        spec,
        module=_Tapped(spec.module, list(own.values())),
        outputs=(*spec.outputs, *outputs),
        compare={**spec.compare, **made},
        tapped=frozenset(made),
    )
