"""From a variant to a session: which device, which layout, which backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmedge.bundle.manifest import Layout, Variant
from mmedge.bundle.opening import Bundle
from mmedge.runtimes.session import Session, SessionOptions, backend, open_session

__all__ = ["DEFAULT_BACKEND", "open_variant", "session_options"]

DEFAULT_BACKEND = "onnxruntime"


def session_options(
    backend_name: str, device: str | None, options: SessionOptions | None
) -> SessionOptions:
    """Settle on which device a session runs.

    Args:
        backend_name: One of mmedge.runtimes.session.BACKENDS.
        device: Overrides the device of `options`; None leaves it, and where there are no options
            either takes the best device that the backend has here.
        options: The rest of the settings, None for the defaults.

    Raises:
        BackendUnavailableError: If there is no backend of that name.
    """
    if device is not None:
        return replace(options or SessionOptions(), device=device)
    if options is not None:
        return options
    devices = backend(backend_name).available_devices()
    # With no device at all the engine is missing, and opening the session says how to get it.
    return SessionOptions(device=devices[0]) if devices else SessionOptions()


def open_variant(
    bundle: Bundle, variant: Variant, *, backend_name: str, options: SessionOptions
) -> Session:
    """Open the graph of a variant that suits a backend and a device.

    Raises:
        InputError: If the variant has no graph in a layout that the backend takes.
        BackendUnavailableError, PlacementError, BackendError: See Backend.open_session.
    """
    model = bundle.model_path(variant, layouts=_layouts(backend_name, options.device))
    return open_session(model, backend_name=backend_name, options=options)


def _layouts(backend_name: str, device: str) -> Sequence[Layout]:
    if backend_name not in ("onnxruntime", "fake"):
        return ("portable",)
    # The onnxruntime layout is made of operators that are fast, or exist, on the CPU alone; on
    # another device it is the last resort, and placement is checked there.
    on_cpu = backend_name == "onnxruntime" and device == "cpu"
    return ("onnxruntime", "portable") if on_cpu else ("portable", "onnxruntime")
