"""Contents of each config.pbtxt of a Triton model repository.

Field names and their meaning: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmedge.bundle.manifest import Role
from mmedge.bundle.tensors import TensorEntry
from mmedge.exports.pbtxt import Field, Message, Word
from mmedge.specs import Axis

__all__ = [
    "FRAME",
    "IMAGE",
    "TEXT",
    "Device",
    "Platform",
    "Warmup",
    "encoder_config",
    "ensemble_config",
    "max_batch",
    "preprocessing_config",
]

Platform: TypeAlias = Literal["onnxruntime_onnx", "tensorrt_plan"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]

IMAGE, FRAME, TEXT = "image", "frame", "text"
"""Inputs of the preprocessing models: bytes of an image file, a raw frame, a text."""

_BITS = (8, 16, 32, 64)
_TYPES = {
    "bool": "TYPE_BOOL",
    **{f"{kind}{bits}": f"TYPE_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in _BITS},
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}


@dataclass(frozen=True, slots=True)
class Warmup:
    """A warm-up request that the server makes before a model is ready.

    Attributes:
        shapes: Shape of each input, without the batch axis where there is one.
        files: File of each input in the model's folder `warmup`.
    """

    shapes: Mapping[str, Sequence[int]]
    files: Mapping[str, str]


def max_batch(role: Role, axes: Mapping[str, Axis]) -> int:
    """Return the largest batch of a role, 0 if its inputs and outputs share no batch axis."""
    firsts = {entry.shape[0] if entry.shape else 0 for entry in (*role.inputs, *role.outputs)}
    first = firsts.pop() if len(firsts) == 1 else 0
    return axes[first].max if isinstance(first, str) and first in axes else 0


def encoder_config(
    name: str,
    role: Role,
    axes: Mapping[str, Axis],
    *,
    platform: Platform,
    device: Device,
    warmup: Warmup,
    graph_level: int | None = None,
) -> Message:
    """Return the configuration of a model that runs a role's graph.

    Args:
        name: Of the model, which is its folder's name.
        role: What it takes and gives.
        axes: Bounds of its dynamic axes.
        platform: What runs it.
        device: "auto" leaves it to the server: one instance on each GPU, or one on the CPU.
        warmup: The request before it is ready.
        graph_level: How much ONNX Runtime may rewrite the graph, in Triton's numbers: -1 basic, 1
            extended. None leaves the server's own choice, which is everything.
    """
    batch = max_batch(role, axes)
    fields: dict[str, Field] = {
        "name": name,
        "platform": platform,
        "max_batch_size": batch,
        "input": [_tensor(entry, batched=batch > 0) for entry in role.inputs],
        "output": [_tensor(entry, batched=batch > 0) for entry in role.outputs],
    }
    if batch > 1:
        # Half and full batches: sizes that a queue of single requests reaches quickly.
        fields["dynamic_batching"] = {"preferred_batch_size": sorted({-(-batch // 2), batch})}
    if device != "auto":
        kind = Word("KIND_CPU" if device == "cpu" else "KIND_GPU")
        fields["instance_group"] = [{"kind": kind, "count": 1}]
    if graph_level is not None:
        fields["optimization"] = {"graph": {"level": graph_level}}
    fields["model_warmup"] = [
        {
            "name": "one golden sample",
            "batch_size": 1,
            "inputs": [
                {
                    "key": entry.name,
                    "value": {
                        "data_type": _type(entry.dtype),
                        "dims": list(warmup.shapes[entry.name]),
                        "input_data_file": warmup.files[entry.name],
                    },
                }
                for entry in role.inputs
            ],
        }
    ]
    return fields


def preprocessing_config(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[TensorEntry],
    batch: int,
    *,
    instances: int,
) -> Message:
    """Return the configuration of a Python model that prepares images or texts.

    Args:
        name: Of the model.
        inputs: Of IMAGE, FRAME and TEXT; where there are several, a request gives one of them.
        outputs: What the encoder takes.
        batch: Largest batch, 0 for none.
        instances: Processes that run it.
    """
    optional = len(inputs) > 1
    raw: dict[str, tuple[str, list[int]]] = {
        IMAGE: ("TYPE_STRING", [1]),
        FRAME: ("TYPE_UINT8", [-1, -1, 3]),
        TEXT: ("TYPE_STRING", [1]),
    }
    taken: list[Message] = []
    for each in inputs:
        kind, dims = raw[each]
        entry: dict[str, Field] = {"name": each, "data_type": Word(kind), "dims": dims}
        if optional:
            entry["optional"] = True
        taken.append(entry)
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": batch,
        "input": taken,
        "output": [_tensor(entry, batched=batch > 0) for entry in outputs],
        "instance_group": [{"kind": Word("KIND_CPU"), "count": instances}],
    }


def ensemble_config(
    name: str,
    preprocessing: Message,
    encoder: Message,
) -> Message:
    """Return the configuration of an ensemble of preprocessing and encoder.

    Args:
        name: Of the ensemble.
        preprocessing: Configuration of the first step; the ensemble takes its inputs.
        encoder: Configuration of the second; the ensemble gives its outputs.
    """
    between = _names(encoder, "input")
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": encoder["max_batch_size"],
        "input": preprocessing["input"],
        "output": encoder["output"],
        "ensemble_scheduling": {
            "step": [
                _step(preprocessing, _names(preprocessing, "input"), between),
                _step(encoder, between, _names(encoder, "output")),
            ]
        },
    }


def _step(config: Message, inputs: Sequence[str], outputs: Sequence[str]) -> Message:
    return {
        "model_name": config["name"],
        "model_version": -1,  # newest version
        "input_map": [{"key": each, "value": each} for each in inputs],
        "output_map": [{"key": each, "value": each} for each in outputs],
    }


def _names(config: Message, field: str) -> list[str]:
    entries = config[field]
    assert isinstance(entries, Sequence)  # noqa: S101, as this module wrote them
    return [str(entry["name"]) for entry in entries if isinstance(entry, Mapping)]


def _tensor(entry: TensorEntry, *, batched: bool) -> Message:
    shape = entry.shape[1:] if batched else entry.shape
    dims = [-1 if isinstance(axis, str) else axis for axis in shape]
    return {"name": entry.name, "data_type": _type(entry.dtype), "dims": dims}


def _type(dtype: str) -> Word:
    return Word(_TYPES[dtype])
