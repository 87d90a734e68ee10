"""Measurement of values inside a graph, whose outputs are replaced by the measures.

What is measured is computed by the engine, so an activation never leaves it: only a few numbers, a
histogram or a matrix a tensor come out, and memory does not grow with the batch or the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.graphs.opening import open_graph
from mmedge.converters.graphs.worker import IsolatedGraph, Worker
from mmedge.converters.passes.building import add_initializer
from mmedge.converters.passes.matching import is_op
from mmedge.errors import QuantizationError
from mmedge.files.atomic import temporary_file
from mmedge.runtimes.session import Session
from mmedge.specs import Array

__all__ = ["Measure", "Probe", "ProbeBuilder", "open_probe", "written_beside"]


class ProbeBuilder:
    """Appends nodes to the end of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._count = 0

    def constant(self, array: Array) -> ir.Value:
        """Add a constant and return its value."""
        return add_initializer(self._graph, self._name(), array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int | str] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Add a node of ONNX's own domain and return its only output, which has that dtype."""
        made = ir.node(op_type, inputs, attributes or {}, name=self._name())
        made.outputs[0].name = self._name()
        made.outputs[0].type = ir.TensorType(dtype)
        self._graph.append(made)
        return made.outputs[0]

    def rows(self, value: ir.Value) -> ir.Value:
        """Return the value as a matrix (rows, C), C being its last axis; nothing is copied."""
        return self.node("Flatten", [value], {"axis": -1})

    def _name(self) -> str:
        self._count += 1
        return f"mmedge_probe_{self._count}"


Measure: TypeAlias = Callable[[ProbeBuilder, str, ir.Value], Mapping[str, ir.Value]]
"""Adds measures of a named value to a graph and returns them by name."""


class Probe:
    """An open session whose outputs are measures of tensors."""

    def __init__(
        self, session: Session | IsolatedGraph, outputs: Mapping[str, Mapping[str, str]]
    ) -> None:
        self._session = session
        self._outputs = outputs

    def run(self, feed: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """Return the measures of each tensor, by name."""
        results = self._session.run(feed)
        return {
            name: {what: results[output] for what, output in outputs.items()}
            for name, outputs in self._outputs.items()
        }


@contextmanager
def open_probe(
    model: Path, tensors: Sequence[str], measure: Measure, worker: Worker | None = None
) -> Iterator[Probe]:
    """Open a session of `model` whose outputs are measures of tensors.

    Without a worker it runs in this process. That is for float graphs, which is what calibration
    reads: each has run in a worker before, or is such a graph with other numbers.

    Args:
        model: ONNX file in any layout. It is not changed. A small file lies beside it, where its
            external data is found, while the engine reads it; one that a killed process left there
            is removed by the next probe in that folder.
        tensors: Names of float32 values of its main graph, graph inputs among them.
        measure: What to measure of each.
        worker: Where a graph runs that has not run before, such as a quantized one.

    Raises:
        QuantizationError: If there is no such tensor, or it is not float32.
        BackendError: If the engine rejects the graph, or crashes in the worker.
        StorageError: If the folder of `model` cannot be written.
    """
    graph = ir.load(model)
    outputs = _replace_outputs(graph, tensors, measure)
    session: Session | IsolatedGraph
    with ExitStack() as stack:
        with written_beside(graph, model.parent) as path:
            if worker is None:
                session = stack.enter_context(open_graph(path))
            else:
                session = stack.enter_context(worker.open(path, model.name))
        yield Probe(session, outputs)


def _replace_outputs(
    model: ir.Model, tensors: Sequence[str], measure: Measure
) -> dict[str, dict[str, str]]:
    graph = model.graph
    builder = ProbeBuilder(graph)
    values = {value.name: value for value in graph.inputs}
    values.update({value.name: value for node in graph for value in node.outputs})
    names: dict[str, dict[str, str]] = {}
    outputs: list[ir.Value] = []
    for name in dict.fromkeys(tensors):
        value = values.get(name)
        if value is None or value.dtype not in (ir.DataType.FLOAT, None):
            what = "no such tensor" if value is None else f"it is {value.dtype}"
            raise QuantizationError(
                f"Statistics of '{name}': {what}. Name float32 values of the main graph."
            )
        found = measure(builder, name, value)
        names[name] = {what: output.name or "" for what, output in found.items()}
        outputs.extend(found.values())
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    _remove_unused(model)
    return names


def _remove_unused(model: ir.Model) -> None:
    """Remove unused nodes; attention keeps its past, or ONNX Runtime rejects it."""
    joining = {
        node: [value.name for value in node.outputs]
        for node in model.graph
        if is_op(node, "Attention") and any(node.inputs[4:])
    }
    RemoveUnusedNodesPass()(model)
    for node, names in joining.items():
        node.resize_outputs(len(names))
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name


@contextmanager
def written_beside(model: ir.Model, folder: Path) -> Iterator[Path]:
    """Write a graph into a folder for as long as the block runs."""
    with temporary_file(folder, "graph", "onnx") as path:
        ir.save(model, path)
        yield path
