"""From a variant to a session: which device, which layout, in a backend that is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from mmedge.bundle.manifest import Layout, Variant
from mmedge.bundle.opening import Bundle
from mmedge.runtimes.session import Session, SessionOptions, backend, open_session
from mmedge.sessions.axes import dynamic_axes, role_of
from mmedge.specs import Precision

__all__ = [
    "DEFAULT_BACKEND",
    "device_name",
    "graph_of",
    "open_variant",
    "session_options",
    "takes",
    "with_axes",
]

DEFAULT_BACKEND = "onnxruntime"


def session_options(
    backend_name: str, device: str | None, options: SessionOptions | None
) -> SessionOptions:
    """Settle on which device a session runs.

    Args:
        backend_name: One of mmedge.runtimes.session.BACKENDS.
        device: Overrides the device of `options`; None leaves it, and where there are no options
            either takes the best device that the backend has here. "gpu" is another word for
            "cuda".
        options: The rest of the settings, None for the defaults.

    Raises:
        BackendUnavailableError: If there is no backend of that name.
    """
    if device is not None:
        return replace(options or SessionOptions(), device=device_name(device))
    if options is not None:
        return replace(options, device=device_name(options.device))
    devices = backend(backend_name).available_devices()
    # With no device at all the engine is missing, and opening the session says how to get it.
    return SessionOptions(device=devices[0]) if devices else SessionOptions()


def device_name(word: str) -> str:
    """Return the device that a word stands for: "cuda" for "gpu", "cuda:1" for "gpu:1"."""
    kind, colon, number = word.partition(":")
    return f"cuda{colon}{number}" if kind == "gpu" else word


def open_variant(
    bundle: Bundle, variant: Variant, *, backend_name: str, options: SessionOptions
) -> Session:
    """Open the graph of a variant that suits a backend and a device.

    Where `options` do not bound the dynamic axes, the manifest does.

    Raises:
        InputError: If the variant has no graph in a layout that the backend takes.
        BackendUnavailableError, PlacementError, BackendError: See Backend.open_session.
    """
    return open_session(
        graph_of(bundle, variant, backend_name, options.device),
        backend_name=backend_name,
        options=with_axes(bundle, variant, options),
    )


def graph_of(bundle: Bundle, variant: Variant, backend_name: str, device: str) -> Path:
    """Return the graph of a variant in the layout that a backend likes best on a device.

    Raises:
        InputError: If the variant has no graph in a layout that the backend takes.
        BackendUnavailableError: If there is no backend of that name.
    """
    # A backend that never has such a device says so itself, whatever graph it is shown.
    layouts = _layouts(backend_name, device) or tuple(variant.models)
    return bundle.model_path(variant, layouts=layouts)


def with_axes(bundle: Bundle, variant: Variant, options: SessionOptions) -> SessionOptions:
    """Return options that bound the dynamic axes of a variant as its manifest does.

    Args:
        bundle: That holds the variant.
        variant: What is to run.
        options: Returned as they are if they bound the axes already.
    """
    role = role_of(bundle.manifest, variant)
    if options.axes is not None or role is None:
        return options
    return replace(options, axes=dynamic_axes(bundle.manifest, role))


def takes(variant: Variant, backend_name: str, device: str) -> bool:
    """Tell whether a variant has a graph in a layout that a backend runs on a device.

    ONNX Runtime has no bfloat16 kernels on CPUs.

    Raises:
        BackendUnavailableError: If there is no backend of that name.
    """
    if variant.precision is Precision.BF16 and device == "cpu" and backend_name == "onnxruntime":
        return False
    return any(layout in variant.models for layout in _layouts(backend_name, device))


def _layouts(backend_name: str, device: str) -> tuple[Layout, ...]:
    return cast("tuple[Layout, ...]", backend(backend_name).layouts(device))
