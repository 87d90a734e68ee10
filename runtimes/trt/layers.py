"""Layers of an engine and their precision, checked against the graph.

Two sources: with a verbose logger the builder lists the layers of the engine, which needs no GPU;
the engine inspector reports them as JSON, for an engine on a GPU. Networks are strongly typed, yet
the builder silently computes quantized products in float where it has no kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import EngineLayer

__all__ = [
    "check_precision",
    "folded",
    "inspect_layers",
    "parse_inspection",
    "parse_layers",
]

# The library's dtype names: "Float", "Half", "Row major linear FP32", "Int8", "E4M3", ...
_DTYPES = (
    ("fp16", r"half|fp16"),
    ("bf16", r"bfloat16|bf16"),
    ("fp8", r"fp8|e4m3"),
    ("fp4", r"fp4|e2m1"),
    ("int4", r"int4"),
    ("uint8", r"uint8"),
    ("int8", r"int8"),
    ("int32", r"int32"),
    ("int64", r"int64"),
    ("bool", r"bool"),
    ("fp32", r"float|fp32"),
)
_FIELDS = re.compile(
    r", (LayerType|Inputs|Constants|Outputs|Weights|Bias|TacticName|StreamId|Metadata): "
)
_TENSOR_DTYPE = re.compile(r"(?:Datatype|DataType|Format/Datatype): ([^,}]+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\[\s]|$)")


def parse_layers(message: str) -> tuple[EngineLayer, ...]:
    """Return the layers in the builder's log.

    Args:
        message: The logger's message, from "Layers:" on; may be "".
    """
    found: list[EngineLayer] = []
    for line in message.split("\n"):  # not splitlines: metadata is separated by U+001E
        if not line.startswith("Name: ") or ", LayerType: " not in line:
            continue  # a heading, or the inputs and outputs of the engine
        name, *rest = _FIELDS.split(line.removeprefix("Name: "))
        fields = dict(zip(rest[::2], rest[1::2], strict=True))
        found.append(
            EngineLayer(
                name=name,
                kind=fields.get("LayerType", ""),
                inputs=_dtypes(_TENSOR_DTYPE.findall(fields.get("Inputs", ""))),
                outputs=_dtypes(_TENSOR_DTYPE.findall(fields.get("Outputs", ""))),
                tactic=fields.get("TacticName", ""),
                constants=_dtypes(_TENSOR_DTYPE.findall(fields.get("Constants", ""))),
                nodes=_nodes(fields.get("Metadata", "")),
            )
        )
    return tuple(found)


def inspect_layers(module: Any, engine: Any) -> tuple[EngineLayer, ...]:  # noqa: ANN401
    """Return the layers of a loaded engine, from its inspector.

    Args:
        module: A TensorRT's module.
        engine: Its ICudaEngine, built with detailed verbosity.
    """
    inspector = engine.create_engine_inspector()
    return parse_inspection(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def parse_inspection(text: str) -> tuple[EngineLayer, ...]:
    """Return the layers in an engine inspector's report, in the form of 10.x or 11.x.

    Unreadable reports give no layers: the engine still runs.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    entries = document.get("Layers", ()) if isinstance(document, dict) else ()
    return tuple(_inspected(entry) for entry in entries if isinstance(entry, dict | str))


def _inspected(entry: dict[str, Any] | str) -> EngineLayer:
    if isinstance(entry, str):  # built with names only
        return EngineLayer(entry, "", (), ())
    weights = [entry[name] for name in ("Weights", "Bias") if isinstance(entry.get(name), dict)]
    constants = [*_tensors(entry, "Constants"), *(w for w in weights if w.get("Count") != 0)]
    return EngineLayer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        inputs=_dtypes(map(_dtype_field, _tensors(entry, "Inputs"))),
        outputs=_dtypes(map(_dtype_field, _tensors(entry, "Outputs"))),
        tactic=str(entry.get("TacticName", "")),
        constants=_dtypes(map(_dtype_field, constants)),
        nodes=_nodes(str(entry.get("Metadata", ""))),
    )


def _tensors(entry: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    return [tensor for tensor in entry.get(field, ()) if isinstance(tensor, dict)]


def _dtype_field(tensor: Mapping[str, Any]) -> str:
    """Return the fields that hold a tensor's dtype: in 11.x, in 10.x, and of weights."""
    for field in ("DataType", "Datatype", "Format/Datatype", "Type", "Format"):
        if tensor.get(field):
            return str(tensor[field])
    return ""


def _dtypes(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(_dtype(word) for word in words)


def _dtype(words: str) -> str:
    text = words.lower()
    return next((name for name, pattern in _DTYPES if re.search(pattern, text)), text.strip())


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(metadata)))


def folded(layers: Sequence[EngineLayer], quantized: Mapping[str, str]) -> dict[str, str]:
    """Return the quantized nodes that the engine computes in float.

    A node is computed in a dtype if a layer made from it has a constant or input of that dtype.

    Args:
        layers: Of the engine.
        quantized: See network.quantized_nodes.

    Returns:
        The part of `quantized` that was folded.
    """
    computed = {
        (node, dtype)
        for layer in layers
        for dtype in {*layer.constants, *layer.inputs}
        for node in layer.nodes
    }
    return {node: dtype for node, dtype in quantized.items() if (node, dtype) not in computed}


def check_precision(layers: Sequence[EngineLayer], quantized: Mapping[str, str]) -> tuple[str, ...]:
    """Check that quantized nodes are computed in quantized values.

    Args:
        layers: Of the engine; none are checked if the library reports none.
        quantized: As for `folded`.

    Returns:
        Warnings: which nodes were folded, or that nothing could be checked.

    Raises:
        EngineBuildError: If all nodes of one dtype were folded to float.
    """
    if not quantized:
        return ()
    if not any(layer.nodes for layer in layers):
        wanted = ", ".join(sorted(set(quantized.values())))
        return (f"The library does not report its layers: whether {wanted} is used is unknown.",)
    lost = folded(layers, quantized)
    warnings = []
    for dtype in sorted(set(lost.values())):
        names = sorted(node for node, found in lost.items() if found == dtype)
        total = list(quantized.values()).count(dtype)
        if len(names) == total:
            raise EngineBuildError(
                f"The graph has {total} nodes in {dtype}, and the engine computes all of them in "
                f"float ({_listed(names)}), which gains no speed. Use a variant in another form "
                "(docs/quantization.md, 'For engines'), another --target, or fp16."
            )
        warnings.append(f"{len(names)} of {total} nodes in {dtype} run in float: {_listed(names)}.")
    return tuple(warnings)


def _listed(names: Sequence[str], shown: int = 5) -> str:
    more = "" if len(names) <= shown else f" and {len(names) - shown} more"
    return ", ".join(f"'{name}'" for name in names[:shown]) + more
