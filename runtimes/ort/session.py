"""Sessions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.base import SessionBase
from mmedge.runtimes.onnx_file import axis_dim
from mmedge.runtimes.ort.engine import engine_exceptions, mapped
from mmedge.runtimes.ort.state import OrtState
from mmedge.runtimes.session import Placement
from mmedge.runtimes.state import HostState
from mmedge.specs import Array, Axis, State, TensorSpec

__all__ = ["OrtSession"]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}


class OrtSession(SessionBase[Any]):  # an onnxruntime.InferenceSession, which has no types
    """A Session on ONNX Runtime. Made by `OrtBackend.open_session`.

    A binding on the CPU reads and writes the arrays themselves. On CUDA each run copies the inputs
    to the device and the outputs back into the same arrays.
    """

    def __init__(
        self,
        native: Any,  # noqa: ANN401
        model: Path,
        placement: Placement,
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        inputs = tuple(_spec(arg, model) for arg in native.get_inputs())
        outputs = tuple(_spec(arg, model) for arg in native.get_outputs())
        super().__init__(native, model, inputs, outputs, placement, axes)
        self._output_names = [spec.name for spec in outputs]

    def _run(self, engine: Any, feed: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ANN401
        with self._mapped("the run failed"):
            values = engine.run(self._output_names, feed)
        return dict(zip(self._output_names, values, strict=True))

    def _bound(
        self,
        engine: Any,  # noqa: ANN401
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> Callable[[], None]:
        on_host = self._placement.device == "cpu"
        with self._mapped("the buffers cannot be bound"):
            bound = engine.io_binding()
            for name, array in inputs.items():
                bound.bind_cpu_input(name, array)
            for name, array in outputs.items():
                bound.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def call() -> None:
            with self._mapped("the run failed"):
                if not on_host:
                    # The engine copies to the device when an input is bound, not when it runs.
                    for name, array in inputs.items():
                        bound.bind_cpu_input(name, array)
                engine.run_with_iobinding(bound)

        return call

    def _state_kind(self, state: State) -> type[HostState]:
        # On the CPU `run` hands over its outputs without a copy, at half the cost of a binding.
        in_place = any(tensor.update == "in_place" for tensor in state.tensors)
        return OrtState if in_place or self._placement.device != "cpu" else HostState

    def _free(self, engine: Any) -> None:  # noqa: ANN401
        if engine.get_session_options().enable_profiling:
            engine.end_profiling()

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except engine_exceptions() as error:
            raise mapped(error, f"{self._model}: {what}") from error


def _spec(arg: Any, model: Path) -> TensorSpec:  # noqa: ANN401
    """Return the spec of an onnxruntime.NodeArg."""
    if arg.type not in _DTYPES:
        raise BackendError(
            f"{model}: '{arg.name}' is a {arg.type}, which numpy lacks. Convert the model with "
            "float32, float16 or integer inputs and outputs."
        )
    shape = tuple(axis_dim(size, arg.name, axis) for axis, size in enumerate(arg.shape))
    return TensorSpec(arg.name, np.dtype(_DTYPES[arg.type]), shape)
