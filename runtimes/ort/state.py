"""State bound in ONNX Runtime: on the device, or in one buffer updated in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mmedge.runtimes.ort.engine import load_engine
from mmedge.runtimes.state import HostState
from mmedge.specs import Array, shape_of

if TYPE_CHECKING:
    from mmedge.runtimes.ort.session import OrtSession

__all__ = ["OrtState"]


class OrtState(HostState):
    """A StatefulRun on ONNX Runtime. Made by `OrtSession.start`.

    The present of one step is bound as the past of the next, on the session's device. What is
    updated in place is one buffer, bound as input and as output, so its graph must write it before
    it reads it.
    """

    def _hold(self, array: Array) -> Any:  # noqa: ANN401, an onnxruntime.OrtValue
        return load_engine().OrtValue.ortvalue_from_numpy(array, *self._device)

    def _read(self, value: Any) -> Array:  # noqa: ANN401
        return np.asarray(value.numpy())

    def _shape(self, value: Any) -> tuple[int, ...]:  # noqa: ANN401
        return tuple(value.shape())

    @property
    def _device(self) -> tuple[str, int]:
        kind, _, index = self._session.placement.device.partition(":")
        return kind, int(index or 0)

    def _call(
        self, feed: Mapping[str, Array], held: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        session = cast("OrtSession", self._session)
        native = session._opened()
        made = [tensor for tensor in self._state.tensors if tensor.output is not None]
        device = self._device
        outputs: dict[str, Array] = {}
        with session._mapped("the run failed"):
            bound = native.io_binding()
            for name, array in feed.items():
                bound.bind_cpu_input(name, array)
            for name, value in held.items():
                bound.bind_ortvalue_input(name, value)
            for spec in self._returned:
                shape = shape_of(spec, sizes)
                if shape is None:
                    bound.bind_output(spec.name, "cpu")
                else:
                    array = outputs[spec.name] = np.empty(shape, spec.dtype)
                    bound.bind_output(
                        spec.name, "cpu", 0, spec.dtype.type, shape, array.ctypes.data
                    )
            for tensor in made:
                if tensor.update == "in_place":
                    bound.bind_ortvalue_output(tensor.output, held[tensor.input])
                else:
                    bound.bind_output(tensor.output, *device)
            native.run_with_iobinding(bound)
            values = bound.get_outputs()  # in the order of binding
        for spec, value in zip(self._returned, values, strict=False):
            if spec.name not in outputs:
                outputs[spec.name] = np.array(value.numpy())
        returned = {spec.name: outputs[spec.name] for spec in self._returned}
        present = zip(made, values[len(self._returned) :], strict=True)
        # Keeping the original buffer keeps its memory.
        return returned, {t.input: value for t, value in present if t.update != "in_place"}
