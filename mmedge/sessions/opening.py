"""Opening a variant: its device, layout and session in a given backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from mmedge.bundle.manifest import Layout, Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import ManifestError
from mmedge.runtimes.backends import VariantFacts, backend, open_session
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.axes import dynamic_axes, role_of
from mmedge.sessions.checks import check_graph

__all__ = [
    "device_name",
    "facts_of",
    "graph_of",
    "open_variant",
    "session_options",
    "takes",
    "with_axes",
]


def session_options(
    backend_name: str, device: str | None, options: SessionOptions | None
) -> SessionOptions:
    """Resolve the device of a session.

    Args:
        backend_name: One of mmedge.runtimes.BACKENDS.
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
    # Without any device the engine is missing, and opening the session raises how to install it.
    return SessionOptions(device=devices[0]) if devices else SessionOptions()


def device_name(word: str) -> str:
    """Return the device of an alias: "cuda" for "gpu", "cuda:1" for "gpu:1"."""
    kind, colon, number = word.partition(":")
    return f"cuda{colon}{number}" if kind == "gpu" else word


def open_variant(
    bundle: Bundle, variant: Variant, *, backend_name: str, options: SessionOptions
) -> Session:
    """Open a variant's graph in the layout for a backend and device.

    Where `options` do not bound the dynamic axes, the manifest does.

    Raises:
        InputError: If the variant has no graph in a layout that the backend takes.
        BackendUnavailableError, PlacementError, BackendError: See Backend.open_session.
        ManifestError: If the graph has other inputs or outputs than the manifest says.
    """
    session = open_session(
        graph_of(bundle, variant, backend_name, options.device),
        backend_name=backend_name,
        options=with_axes(bundle, variant, options),
    )
    name = role_of(bundle.manifest, variant)
    if name is not None:
        try:
            check_graph(bundle.path, name, bundle.role(name), session)
        except ManifestError:
            session.close()
            raise
    return session


def graph_of(bundle: Bundle, variant: Variant, backend_name: str, device: str) -> Path:
    """Return a variant's graph in the layout that a backend prefers on a device.

    Raises:
        InputError: If the variant has no graph in a layout that the backend takes.
        BackendUnavailableError: If there is no backend of that name.
    """
    # A backend without such a device raises for any graph.
    layouts = backend(backend_name).layouts(device) or tuple(variant.models)
    return bundle.model_path(variant, layouts=cast("tuple[Layout, ...]", layouts))


def with_axes(bundle: Bundle, variant: Variant, options: SessionOptions) -> SessionOptions:
    """Return options with the manifest's bounds of a variant's dynamic axes.

    Args:
        bundle: That holds the variant.
        variant: What is to run.
        options: Returned as they are if they bound the axes already.
    """
    role = role_of(bundle.manifest, variant)
    if options.axes is not None or role is None:
        return options
    return replace(options, axes=dynamic_axes(bundle.manifest, role))


def facts_of(variant: Variant) -> VariantFacts:
    """Return the manifest's facts about a variant, for a backend."""
    return VariantFacts(tuple(variant.models), variant.precision, variant.recipe)


def takes(variant: Variant, backend_name: str, device: str) -> bool:
    """Return whether a backend runs a variant on a device.

    Raises:
        BackendUnavailableError: If there is no backend of that name.
    """
    return backend(backend_name).unsupported(facts_of(variant), device) is None
