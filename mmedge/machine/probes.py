"""Asking one engine what it is, in a process of its own; started by mmedge.machine.host.

Prints one line of JSON: what the engine says of itself, or `fault`, why it does not start.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from mmedge.errors import MmedgeError
from mmedge.runtimes.trt.engines import FLAVOURS, Flavour

__all__ = ["main"]


def _onnxruntime() -> dict[str, object]:
    from mmedge.runtimes.ort.engine import load_engine

    engine = load_engine()
    return {
        "loaded": f"{_distribution(engine)} {engine.__version__}",
        "module": str(engine.__file__),
        "providers": engine.get_available_providers(),
    }


def _distribution(engine: ModuleType) -> str:
    """Return the name under which the loaded build is published: "onnxruntime-gpu"."""
    try:
        info = importlib.import_module(f"{engine.__name__}.capi.build_and_package_info")
    except ImportError:  # built from source
        return engine.__name__
    return str(getattr(info, "package_name", engine.__name__))


def _openvino() -> dict[str, object]:
    from mmedge.runtimes.openvino import available_devices

    devices = available_devices()
    if not devices:  # it swallows why; the import itself says it
        importlib.import_module("openvino")
    return {"devices": list(devices)}


def _cuda() -> dict[str, object]:
    from mmedge.runtimes.cuda.runtime import Device, cuda_version, device_count, driver_version

    found: dict[str, object] = {"driver": driver_version(), "runtime": cuda_version()}
    devices = []
    for index in range(device_count()):
        device = Device(index)
        free_bytes, _ = device.memory_bytes()
        properties = device.properties
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "compute_capability": properties.compute_capability,
                "memory_bytes": properties.memory_bytes,
                "free_bytes": free_bytes,
                "integrated": properties.integrated,
            }
        )
    return found | {"devices": devices}


def _tensorrt(flavour: Flavour) -> dict[str, object]:
    from mmedge.runtimes.trt.flavours import load_flavour

    loaded = load_flavour(flavour)
    return {"version": loaded.version, "compute_capabilities": list(loaded.capabilities)}


def main(name: str) -> None:
    """Ask one engine and print its answer.

    Args:
        name: "onnxruntime", "openvino", "cuda", or a flavour of TensorRT.
    """
    asked: Mapping[str, Callable[[], dict[str, object]]] = {
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "cuda": _cuda,
    }
    try:
        answer = _tensorrt(name) if name in FLAVOURS else asked[name]()
    except MmedgeError as error:
        answer = {"fault": str(error)}
    except (ImportError, OSError, RuntimeError) as error:
        answer = {"fault": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
