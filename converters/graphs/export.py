"""Export from torch to ONNX, one role at a time, without local paths."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmedge.converters.families.base import RoleSpec
from mmedge.converters.passes.linears import COMPARE_KEY
from mmedge.errors import ExportError, StorageError
from mmedge.files import storage_errors
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file
from mmedge.specs import Axis

__all__ = [
    "OPSET",
    "export_role",
    "graph_storage_errors",
]

# Opset 23 brings Attention, which TensorRT-RTX rejects in fp32 and the int8 tools cannot read.
OPSET = 20
# Tensors below stay in the graph: engines read shapes and axes without opening the data file.
_INLINE_BYTES = 1024
_SHORT_WRITE = re.compile(r"writing element|requested and \d+ written")
_INVENTED = re.compile(r"s\d+")  # torch's name of an axis that it was given none for


def export_role(role: str, spec: RoleSpec, out: Path, *, plain: bool = False) -> None:
    """Export one role in fp32.

    Weights go to `out.name + ".data"` beside `out`, whatever their size: no limit of 2 GB, and a
    device can map them. The same module gives the same bytes.

    Args:
        role: The role's name, for messages.
        spec: What to export.
        out: The ONNX file to write.
        plain: Leave the graph as torch exports it, without the passes of the portable layout: for
            comparisons with other tools.

    Raises:
        ExportError: If the module cannot be traced, or an axis is not dynamic as specified.
        BackendError: If the ONNX file of a source cannot be read, or keeps weights elsewhere.
        StorageError: If the disk is full.
    """
    import onnx_ir
    from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

    from mmedge.converters.passes import PORTABLE_PASSES

    if spec.module is None:
        assert spec.graph is not None  # noqa: S101, a role has a module or a graph
        # Weights that lead elsewhere would put any file of this machine into the bundle.
        check_external_data(spec.graph, read_onnx_file(spec.graph))
        model = onnx_ir.load(spec.graph)
    else:
        model = _trace(role, spec, spec.module).model
        RemoveUnusedNodesPass()(model)
        # torch names values after operators and outputs, and does not see that they collide.
        NameFixPass()(model)
        _name_weights(model)
        for step in () if plain else PORTABLE_PASSES:
            step()(model)
    _strip(model)
    if spec.module is not None:
        _check_interface(role, spec, model)
    for output in model.graph.outputs:
        output.metadata_props[COMPARE_KEY] = spec.compared(output.name or "").value
    with graph_storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        onnx_ir.save(
            model, out, external_data=f"{out.name}.data", size_threshold_bytes=_INLINE_BYTES
        )


@contextmanager
def graph_storage_errors(out: Path) -> Iterator[None]:
    """Turn disk errors while a graph is written into a StorageError.

    onnx_ir writes weights with numpy, whose error for a short write has lost its errno.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    with storage_errors(out):
        try:
            yield
        except OSError as error:
            if error.errno is None and _SHORT_WRITE.search(str(error)):
                raise StorageError(
                    f"Cannot write {out}: the weights were cut off ({error}), most likely because "
                    "the disk is full. Free some space, or write elsewhere."
                ) from error
            raise


def _trace(role: str, spec: RoleSpec, module: torch.nn.Module) -> Any:  # noqa: ANN401
    # torch takes no sum ("past + sequence") and finds by itself what such an axis follows from.
    axes = {
        name: torch.export.Dim.AUTO if " + " in name else _dimension(name, spec.axes)
        for item in spec.inputs
        for name in item.shape
        if isinstance(name, str)
    }
    # By position: the module's own argument names need not be the graph's.
    shapes: list[Any] = [
        {axis: axes[name] for axis, name in enumerate(item.shape) if isinstance(name, str)}
        for item in spec.inputs
    ]
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:  # one argument to torch
        given = len(parameters) - 1
        shapes[given:] = [tuple(shapes[given:])]
    feed = spec.sample(spec.trace_sizes, 0)
    try:
        program = torch.onnx.export(
            module.eval(),
            tuple(feed[item.name] for item in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[item.name for item in spec.inputs],
            output_names=[item.name for item in spec.outputs],
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ExportError(f"{role}: torch cannot export it: {_reason(error)}") from error
    if program is None:
        raise ExportError(f"{role}: torch exported no graph.")
    return program


def _dimension(name: str, axes: Mapping[str, Axis]) -> Any:  # noqa: ANN401, torch.export.Dim
    axis = axes.get(name)
    # A batch has no upper bound in the graph: bounds are for engines.
    return torch.export.Dim(name, max=None if axis is None or name == "batch" else axis.max)


def _reason(error: BaseException) -> str:
    """Return the first line of the root error, which has torch's reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _name_weights(model: Any) -> None:  # noqa: ANN401, onnx_ir.Model
    """Name the weights that the exporter transposed as the module does: "layers.0.fc1.weight".

    The quantization methods name linear layers by their weights, in every layout alike.
    """
    initializers = model.graph.initializers
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if node.op_type != "MatMul" or len(scopes) < 2:
            continue
        weight = node.inputs[1]
        name = f"{scopes[-2]}.weight"
        alone = weight.is_initializer() and len(weight.consumers()) == 1
        if alone and weight.name.startswith("val_") and name not in initializers:
            initializers.pop(weight.name)
            weight.name = name
            initializers.add(weight)


def _strip(model: Any) -> None:  # noqa: ANN401, onnx_ir.Model
    """Remove the exporter's debug metadata: stack traces with local paths."""
    _clear((model, *model.functions.values()))
    for graph in model.graphs():
        _clear((graph, *graph.inputs, *graph.outputs, *graph.initializers.values()))
        for node in graph:
            _clear((node, *node.outputs))


def _clear(items: Iterable[Any]) -> None:
    for item in items:
        item.metadata_props.clear()
        item.doc_string = None


def _name_sums(spec: RoleSpec, model: Any) -> None:  # noqa: ANN401, onnx_ir.Model
    """Name axes that are sums as specified: torch reorders terms or invents a symbol."""
    specified = {item.name: item.shape for item in (*spec.inputs, *spec.outputs)}
    names = {
        got: name
        for value in (*model.graph.inputs, *model.graph.outputs)
        for got, name in zip(_shape(value), specified.get(value.name, ()), strict=False)
        if isinstance(name, str) and " + " in name and _is_sum(str(got), name)
    }
    for values in (model.graph.inputs, *(node.outputs for node in model.graph)) if names else ():
        for value in values:
            for axis, size in enumerate(value.shape or ()):
                if not isinstance(size, int) and size.value in names:
                    value.shape[axis] = names[size.value]


def _is_sum(got: str, name: str) -> bool:
    return bool(_INVENTED.fullmatch(got)) or sorted(got.split(" + ")) == sorted(name.split(" + "))


def _check_interface(role: str, spec: RoleSpec, model: Any) -> None:  # noqa: ANN401
    """Check names and dynamic axes against the specification."""
    _name_sums(spec, model)
    for what, specs, values in (
        ("input", spec.inputs, model.graph.inputs),
        ("output", spec.outputs, model.graph.outputs),
    ):
        got = {value.name: _shape(value) for value in values}
        expected: Mapping[str, Any] = {item.name: item.shape for item in specs}
        if got != expected:
            raise ExportError(
                f"{role}: exported {what}s are {got}, expected {dict(expected)}. torch has frozen "
                "or renamed an axis; please report the model."
            )


def _shape(value: Any) -> tuple[int | str, ...]:  # noqa: ANN401, onnx_ir.Value
    return tuple(
        dimension if isinstance(dimension, int) else str(dimension.value)
        for dimension in value.shape
    )
