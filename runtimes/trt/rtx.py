"""The backend "tensorrt-rtx": TensorRT for RTX, of desktop GPUs. See backend.py."""

from __future__ import annotations

from mmedge.runtimes.trt.backend import TrtBackend

__all__ = [
    "available_devices",
    "engine_version",
    "is_prepared",
    "layouts",
    "open_session",
    "prepare",
]

_BACKEND = TrtBackend("tensorrt-rtx")

available_devices = _BACKEND.available_devices
engine_version = _BACKEND.engine_version
is_prepared = _BACKEND.is_prepared
layouts = _BACKEND.layouts
open_session = _BACKEND.open_session
prepare = _BACKEND.prepare
