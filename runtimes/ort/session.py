"""The ONNX Runtime backend: CPU, and CUDA where the installed build has it.

Works with onnxruntime 1.20 and newer, and with onnxruntime-gpu. From 1.24 on the engine tells which
provider holds each node; with an older one `Placement.providers` is empty and placement is checked
by the session's providers alone.

On CUDA, shape arithmetic may stay on the CPU, where the engine puts it on purpose, and is listed in
`Placement.exceptions`; any other node there is a PlacementError. (The engine's own
`session.disable_cpu_ep_fallback` would refuse the shape arithmetic too.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.base import SessionBase
from mmedge.runtimes.onnx_file import axis_dim, check_external_data, read_onnx_file
from mmedge.runtimes.ort.engine import (
    available_devices,
    engine_exceptions,
    engine_version,
    int8_saturates,
    layouts,
    load_engine,
    mapped,
    providers_for,
    read_placement,
    session_settings,
)
from mmedge.runtimes.session import (
    Placement,
    SessionOptions,
    always_prepared,
    nothing_to_prepare,
)
from mmedge.specs import Array, Axis, TensorSpec

__all__ = [
    "OrtSession",
    "available_devices",
    "engine_version",
    "is_prepared",
    "layouts",
    "open_session",
    "prepare",
]

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


is_prepared = always_prepared
prepare = nothing_to_prepare


def open_session(model: Path, options: SessionOptions) -> OrtSession:
    """Open an ONNX file in ONNX Runtime.

    Args:
        model: The ONNX file; its external data must lie beside or below it.
        options: How to run it. "auto" graph optimization takes everything, except for a graph that
            holds float16, which stays at "extended": ONNX Runtime 1.32 crashed on some of those at
            the full level.

    Raises:
        BackendUnavailableError: If onnxruntime or the device is missing.
        PlacementError: If nodes would run elsewhere than on the device asked for.
        BackendError: If the file is missing, damaged, or refused by the engine.
        StorageError: If `options.profile_to` cannot be made.

    Warns:
        RuntimeWarning: If int8 sums may saturate on this processor, because the engine cannot sum
            this graph exactly.
    """
    engine = load_engine()
    providers = providers_for(engine, options.device)
    glance = read_onnx_file(model)
    check_external_data(model, glance)
    level = options.graph_optimization
    if level == "auto":
        level = "extended" if glance.has_fp16 else "all"
    saturates = int8_saturates()
    exact = saturates and not glance.paired
    # ONNX Runtime 1.32 makes one operator of a blocked DequantizeLinear and a float16 product, and
    # at the extended level that answers with something else. Up to 1.31 it makes int8 operators of
    # Q/DQ in fp8, and refuses its own graph. Where exact int8 sums are asked for, it turns signed
    # Q/DQ into unsigned, and then refuses the graph or fails in a call.
    as_it_stands = glance.has_fp16 or glance.has_fp8 or (glance.signed_codes and saturates)

    def opened(*, exact: bool) -> OrtSession:
        settings = session_settings(engine, options, level, exact=exact)
        if as_it_stands:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        native = engine.InferenceSession(
            str(model), sess_options=settings, providers=providers, enable_fallback=0
        )
        placement = read_placement(engine, native, options.device, model)
        return OrtSession(native, model, placement, options.axes)

    try:
        try:
            return opened(exact=exact)
        except engine_exceptions() as error:
            # ONNX Runtime 1.32 rewrites weights for exact sums, and fails where two products read
            # one of them.
            if not exact or "replace the existing tensor" not in str(error):
                raise
        warnings.warn(
            f"{model}: ONNX Runtime {engine.__version__} has no exact int8 sums for a graph in "
            "which two products share a weight, so they may saturate on this processor. Run "
            "`mmedge verify`, or convert with int8-dynamic-paired, whose sums are exact.",
            RuntimeWarning,
            stacklevel=3,
        )
        return opened(exact=False)
    except engine_exceptions() as error:
        raise mapped(error, f"{model}: ONNX Runtime {engine.__version__} refuses it") from error


class OrtSession(SessionBase[Any]):  # an onnxruntime.InferenceSession, which has no types
    """A Session on ONNX Runtime. Made by `open_session`.

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
            answers = engine.run(self._output_names, feed)
        return dict(zip(self._output_names, answers, strict=True))

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
            f"{model}: '{arg.name}' is a {arg.type}, which numpy has not. Convert the model with "
            "float32, float16 or integer inputs and outputs."
        )
    shape = tuple(axis_dim(size, arg.name, axis) for axis, size in enumerate(arg.shape))
    return TensorSpec(arg.name, np.dtype(_DTYPES[arg.type]), shape)
