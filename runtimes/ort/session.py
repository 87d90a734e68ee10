"""The ONNX Runtime backend: CPU, and CUDA where the installed build has it.

Works with onnxruntime 1.20 and newer, and with onnxruntime-gpu. From 1.24 on the engine tells which
provider holds each node; with an older one `Placement.providers` is empty and placement is checked
by the session's providers alone.

On CUDA, shape arithmetic may stay on the CPU, where the engine puts it on purpose, and is listed in
`Placement.exceptions`; any other node there is a PlacementError. (The engine's own
`session.disable_cpu_ep_fallback` would refuse the shape arithmetic too.)
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.base import BindingBase, SessionBase, closed_error
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
from mmedge.specs import Array, TensorSpec, check_feed

__all__ = [
    "OrtBinding",
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
        return OrtSession(native, model, read_placement(engine, native, options.device, model))

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


class OrtSession(SessionBase):
    """A Session on ONNX Runtime. Made by `open_session`."""

    def __init__(self, native: Any, model: Path, placement: Placement) -> None:  # noqa: ANN401
        super().__init__(
            tuple(_spec(arg, model) for arg in native.get_inputs()),
            tuple(_spec(arg, model) for arg in native.get_outputs()),
            placement,
        )
        self._native: Any = native  # onnxruntime ships no types
        self._model = model
        self._output_names = [spec.name for spec in self._outputs]
        self._lock = threading.Lock()
        self._bindings: weakref.WeakSet[OrtBinding] = weakref.WeakSet()

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see Session.run.

        May be called from several threads at once, also while another closes the session: a call
        that has begun ends with its answer, a later one is a BackendError.
        """
        native = self._opened()
        check_feed(self._inputs, feed)
        ready = {
            name: array
            if array.flags.c_contiguous and array.flags.aligned
            else np.require(array, requirements=["C", "A"])
            for name, array in feed.items()
        }
        try:
            answers = native.run(self._output_names, ready)
        except engine_exceptions() as error:
            raise mapped(error, f"{self._model}: the run failed") from error
        return dict(zip(self._output_names, answers, strict=True))

    def bind(self, feed: Mapping[str, Array]) -> OrtBinding:
        """Preallocate for the shapes of `feed`; see Session.bind.

        An output axis that the inputs do not name is found by running the graph once.
        """
        native = self._opened()
        outputs = self._buffers(feed)
        try:
            binding = OrtBinding(native, self._model, self._placement.device, dict(feed), outputs)
        except engine_exceptions() as error:
            raise mapped(error, f"{self._model}: the buffers cannot be bound") from error
        with self._lock:
            if self._native is not None:
                self._bindings.add(binding)
                return binding
        binding._release()
        return binding

    def close(self) -> None:
        """Free the engine's memory, once the runs that have begun are done."""
        with self._lock:
            native, self._native = self._native, None
            bindings = list(self._bindings)
        for binding in bindings:
            binding._release()
        if native is not None and native.get_session_options().enable_profiling:
            native.end_profiling()

    def _opened(self) -> Any:  # noqa: ANN401
        # A local reference keeps the engine alive until this call is done, whoever closes it.
        native = self._native
        if native is None:
            raise closed_error(self._model)
        return native

    def __repr__(self) -> str:
        state = "closed" if self._native is None else self._placement.device
        return f"<OrtSession {self._model.name} ({state})>"


class OrtBinding(BindingBase):
    """A Binding on ONNX Runtime. Made by `OrtSession.bind`; dead once the session is closed.

    On the CPU the engine reads and writes the arrays themselves. On CUDA each run copies the inputs
    to the device and the outputs back into the same arrays.
    """

    def __init__(
        self,
        native: Any,  # noqa: ANN401
        model: Path,
        device: str,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> None:
        super().__init__(inputs, outputs)
        self._model = model
        self._on_host = device == "cpu"
        bound = native.io_binding()
        for name, array in inputs.items():
            bound.bind_cpu_input(name, array)
        for name, array in outputs.items():
            bound.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bound: tuple[Any, Any] | None = (native, bound)

    def run(self) -> Mapping[str, Array]:
        """Run the graph on the bound buffers and return `outputs`.

        Raises:
            BackendError: If the engine fails, or the session is closed.
        """
        pair = self._bound
        if pair is None:
            raise closed_error(self._model)
        native, bound = pair
        try:
            if not self._on_host:
                # The engine copies to the device when an input is bound, not when it runs.
                for name, array in self._inputs.items():
                    bound.bind_cpu_input(name, array)
            native.run_with_iobinding(bound)
        except engine_exceptions() as error:
            raise mapped(error, f"{self._model}: the run failed") from error
        return self._outputs

    def _release(self) -> None:
        self._bound = None


def _spec(arg: Any, model: Path) -> TensorSpec:  # noqa: ANN401
    """Return the spec of an onnxruntime.NodeArg."""
    if arg.type not in _DTYPES:
        raise BackendError(
            f"{model}: '{arg.name}' is a {arg.type}, which numpy has not. Convert the model with "
            "float32, float16 or integer inputs and outputs."
        )
    shape = tuple(axis_dim(size, arg.name, axis) for axis, size in enumerate(arg.shape))
    return TensorSpec(arg.name, np.dtype(_DTYPES[arg.type]), shape)
