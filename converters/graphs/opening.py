"""Opening of graphs in a conversion."""

from __future__ import annotations

from pathlib import Path

from mmedge.runtimes.backends import DEFAULT_BACKEND, open_session
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.specs import Axis

__all__ = ["open_graph"]

_LARGEST = 2**31 - 1


def open_graph(model: Path, *, backend_name: str = DEFAULT_BACKEND, spin: bool = False) -> Session:
    """Open a graph on the CPU, its dynamic axes unbounded: a past is empty at prefill.

    Args:
        model: ONNX file.
        backend_name: One of runtimes' BACKENDS.
        spin: Keep idle threads spinning, as on a device: for timing. Other runs only take more
            CPU time by it.

    Raises:
        BackendUnavailableError, PlacementError, BackendError: See Backend.open_session.
    """
    names = {dim for spec in read_onnx_file(model).inputs for dim in spec.shape}
    axes = {name: Axis(0, 1, _LARGEST) for name in names if isinstance(name, str)}
    return open_session(
        model, backend_name=backend_name, options=SessionOptions(axes=axes, spin=spin)
    )
