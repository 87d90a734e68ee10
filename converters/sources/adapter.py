"""Merging of LoRA adapters into a base model at conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.converters.sources.config import Fields, foreign_errors, read_fields
from mmedge.errors import SourceError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "merge_adapter", "read_adapter"]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options that change more than W + scale * B @ A, and the value that leaves them out.
_PLAIN: dict[str, tuple[object, ...]] = {
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, False, "gaussian", True),
    "layer_replication": (None,),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "use_dora": (None, False),
}
_MERGE_ELSEWHERE = (
    "Merge it where it was trained, with peft's model.merge_and_unload(), and save the result with "
    "save_pretrained."
)


def read_adapter(folder: Path) -> Fields:
    """Read `adapter_config.json` and check that it is a plain LoRA with its weights beside it.

    Raises:
        SourceError: If there is none, or it is of another kind.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise SourceError(
            f"{folder} holds no adapter to merge: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} "
            "beside the base model. Add them, or omit --merge-adapter."
        )
    adapter = read_fields(folder / ADAPTER_CONFIG)
    if adapter.text("peft_type") != "LORA":
        raise adapter.error("peft_type", "'LORA'", _MERGE_ELSEWHERE)
    for key, plain in _PLAIN.items():
        if adapter.values.get(key) not in plain:
            raise adapter.error(key, f"{plain[-1]!r}, as in plain LoRA", _MERGE_ELSEWHERE)
    adapter.number("lora_alpha", 0.0, 1e6)
    return adapter


def merge_adapter(model: nn.Module, adapter: Fields) -> None:
    """Add a LoRA to the linear layers that it was trained for, in fp32: W + scale * B @ A.

    Args:
        model: The base model, fp32; changed in place.
        adapter: As read_adapter returns it.

    Raises:
        SourceError: If a tensor belongs to no linear layer of the model, or is of another shape.
    """
    from safetensors.torch import load_file

    path = adapter.file.with_name(ADAPTER_WEIGHTS)
    with foreign_errors(f"{path}: cannot be read", "Download it again."):
        tensors = load_file(path)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        factors.setdefault(layer.removeprefix(_PREFIX), {})[factor] = tensor.float()
    layers = dict(model.named_modules())
    for name, pair in factors.items():
        _merge_layer(layers.get(name), name, pair, adapter)


def _merge_layer(
    layer: nn.Module | None, name: str, pair: Mapping[str, torch.Tensor], adapter: Fields
) -> None:
    import torch
    from torch import nn

    if not isinstance(layer, nn.Linear) or pair.keys() != {"lora_A", "lora_B"}:
        raise SourceError(
            f"{adapter.file.with_name(ADAPTER_WEIGHTS)}: {name} ({', '.join(sorted(pair))}): "
            f"expected lora_A and lora_B of a linear layer of the base model. {_MERGE_ELSEWHERE}"
        )
    down, up = pair["lora_A"], pair["lora_B"]
    rank = max(1, down.shape[0])
    if (up.shape, down.shape) != ((layer.out_features, rank), (rank, layer.in_features)):
        raise SourceError(
            f"{adapter.file.with_name(ADAPTER_WEIGHTS)}: {name}: got B {tuple(up.shape)} and A "
            f"{tuple(down.shape)} for a layer {tuple(layer.weight.shape)}. The adapter is of "
            "another model."
        )
    alpha = adapter.number("lora_alpha", 0.0, 1e6)
    scale = alpha / (math.sqrt(rank) if adapter.flag("use_rslora") else rank)
    with torch.no_grad():
        layer.weight += scale * (up @ down)
