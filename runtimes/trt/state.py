"""State kept on the GPU between calls of a TensorRT session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from mmedge.runtimes.cuda.arrays import DeviceArray
from mmedge.runtimes.state import HostState
from mmedge.specs import Array

if TYPE_CHECKING:
    from mmedge.runtimes.trt.session import TrtSession

__all__ = ["TrtState"]


class TrtState(HostState):
    """A StatefulRun on TensorRT. Made by `TrtSession.start`.

    Each call writes its state to new memory on the device, which the next call reads. Reordering
    stays on the device if sequences are the first axis, else it goes through the host, as
    truncation does.
    """

    def _hold(self, array: Array) -> DeviceArray:
        return DeviceArray.of(array, self._owner._device)

    def _read(self, value: DeviceArray) -> Array:
        return value.numpy()

    def _take(self, value: DeviceArray, rows: Array, axis: int) -> DeviceArray:
        return super()._take(value, rows, axis) if axis else value.take(rows)

    def _call(
        self, feed: Mapping[str, Array], held: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        del sizes
        made = self._owner.run_device({**feed, **held})
        outputs = {spec.name: made[spec.name].numpy() for spec in self._returned}
        return outputs, {t.input: made[t.output] for t in self._state.tensors if t.output}

    @property
    def _owner(self) -> TrtSession:
        return cast("TrtSession", self._session)
