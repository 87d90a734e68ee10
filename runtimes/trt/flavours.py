"""Installed TensorRT versions, and the differences between flavours.

TensorRT 10.x, TensorRT 11.x and TensorRT for RTX share one Python interface except for a few names;
only this module handles the differences. `load_flavour` imports the library.
"""

from __future__ import annotations

import importlib
import re
import threading
import weakref
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from mmedge.errors import BackendUnavailableError

__all__ = [
    "TITLES",
    "BuildLog",
    "Flavour",
    "LoadedFlavour",
    "installed_version",
    "load_flavour",
    "new_log",
]

Flavour: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT of servers and JetPack, or TensorRT for RTX of desktop GPUs."""

TITLES: dict[str, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

# Module names; the first one found is used. The wheels of TensorRT-RTX have only the bindings; its
# front-end package is built from source.
_MODULES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt",
        *(f"tensorrt-cu{n}{end}" for n in (13, 12) for end in ("", "-bindings")),
    ),
    "tensorrt-rtx": (
        *(f"tensorrt-rtx-cu{n}{end}" for n in (13, 12) for end in ("-bindings", "")),
        "tensorrt-rtx",
    ),
}
_INSTALL: dict[str, str] = {
    "tensorrt": (
        "On a Jetson TensorRT comes with JetPack (sudo apt install nvidia-jetpack) for the "
        "system's Python: make the environment with `python3 -m venv --system-site-packages`. On "
        "a server with an NVIDIA GPU: pip install tensorrt-cu13 (tensorrt-cu12 for a driver of "
        'CUDA 12). For a desktop GPU, and to build without any: pip install "mmedge[tensorrt-rtx]"'
        ", and use the backend tensorrt-rtx."
    ),
    "tensorrt-rtx": (
        'On x86-64 or Arm Linux: pip install "mmedge[tensorrt-rtx]" (for a driver of CUDA 12: '
        "pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs). It serves desktop GPUs "
        "and builds without one; on a Jetson or a server use the backend tensorrt."
    ),
}


def installed_version(flavour: str) -> str | None:
    """Return the version of an installed flavour, such as "10.3.0"; None if it is not installed.

    Does not load it.
    """
    module = _installed_module(flavour)
    if module is None:
        return None
    versions = filter(None, map(_distribution_version, _DISTRIBUTIONS[flavour]))
    return next(versions, None) or _version_in_source(module) or "of an unknown version"


def _distribution_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _installed_module(flavour: str) -> str | None:
    return next(filter(_is_importable, _MODULES[flavour]), None)


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # incomplete installation
        return False


def _version_in_source(module: str) -> str:
    """Read __version__ from the source of a package without metadata."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class LoadedFlavour:
    """A loaded TensorRT, and its differences from other versions.

    Attributes:
        flavour: Which one.
        version: Of the library.
        module: Its Python module. Names that differ between flavours have methods here.
    """

    flavour: str
    version: str
    module: ModuleType

    @property
    def network_flags(self) -> int:
        """Flags of a strongly typed network: needed in 10.x, the default in 11.x."""
        flags = getattr(self.module, "NetworkDefinitionCreationFlag", None)
        typed = getattr(flags, "STRONGLY_TYPED", None)
        return 0 if typed is None else 1 << int(typed)  # ignored by 11.x

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that engines can be built for without a GPU, ascending.

        Empty for a flavour that builds for the GPU of its machine alone.
        """
        known = getattr(self.module, "ComputeCapability", None)
        numbers = (re.fullmatch(r"SM(\d+)", name) for name in getattr(known, "__members__", ()))
        found = sorted(int(match[1]) for match in numbers if match)
        return tuple(f"{number // 10}.{number % 10}" for number in found)

    def capability(self, name: str) -> Any:  # noqa: ANN401, the library's own enumeration
        """Return the library's constant for a compute capability such as "8.9"; "" is CURRENT."""
        word = f"SM{name.replace('.', '')}" if name else "CURRENT"
        return getattr(self.module.ComputeCapability, word)

    @property
    def has_timing_cache(self) -> bool:
        """Whether builds time kernels; TensorRT-RTX compiles them when an engine is loaded."""
        return self.flavour == "tensorrt"

    def builder_flag(self, name: str) -> Any | None:  # noqa: ANN401, the library's own enumeration
        """Return a builder flag by name, None if the library lacks it."""
        return getattr(self.module.BuilderFlag, name, None)


def load_flavour(flavour: str) -> LoadedFlavour:
    """Import a TensorRT.

    Raises:
        BackendUnavailableError: If it is not installed (the message names the wheel for each kind
            of machine) or its libraries cannot be loaded.
    """
    name = _installed_module(flavour)
    if name is None:
        raise BackendUnavailableError(
            f"{TITLES[flavour]} is not installed: no module {' or '.join(_MODULES[flavour])}. "
            f"{_INSTALL[flavour]}"
        )
    try:
        module = importlib.import_module(name)
        built = hasattr(module, "Builder") and hasattr(module, "OnnxParser")
    except (ImportError, OSError) as error:  # bindings without libraries
        raise BackendUnavailableError(
            f"{TITLES[flavour]} {installed_version(flavour)} cannot be loaded: {error}. Bindings "
            f"and libraries must be of one version. {_INSTALL[flavour]}"
        ) from error
    if not built:
        raise BackendUnavailableError(
            f"{TITLES[flavour]} {installed_version(flavour)}: module '{name}' has no builder and "
            f"no ONNX parser; it is a runtime only, or another package of that name. "
            f"{_INSTALL[flavour]}"
        )
    return LoadedFlavour(flavour, installed_version(flavour) or "", module)


class BuildLog:
    """Log of a library: warnings, errors, and the layer report of an engine.

    A library has one logger in a process, which serves all logs: messages of a thread in a `with
    log:` block go to that log only, messages of other threads to every log that no thread has
    claimed.

    Attributes:
        errors: The last 100 messages, oldest first.
        warnings: Likewise.
        layers: The message that lists the layers of an engine, "" before it.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""
        self._outer: BuildLog | None = None

    def __enter__(self) -> BuildLog:
        self._outer = _claims.get(threading.get_ident())
        _claims[threading.get_ident()] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._outer is None:
            del _claims[threading.get_ident()]
        else:
            _claims[threading.get_ident()] = self._outer

    def take(self, severity: int, message: str) -> None:
        """Store a message.

        Args:
            severity: The library's: 0 and 1 are errors, 2 a warning, 3 and 4 information.
            message: Its text.
        """
        if severity <= 2:
            messages = self.warnings if severity == 2 else self.errors
            messages.append(message.strip())
            del messages[:-_MAX_MESSAGES]
        elif message.startswith(("Layers:", "Engine Layer Information:")):
            self.layers = message


_MAX_MESSAGES = 100
_claims: dict[int, BuildLog] = {}  # by thread
_unclaimed: weakref.WeakSet[BuildLog] = weakref.WeakSet()
_loggers: dict[int, tuple[ModuleType, Any]] = {}  # by module; they live as long as the process
_lock = threading.Lock()


def new_log(module: ModuleType) -> tuple[Any, BuildLog]:
    """Return a library's logger at the most verbose level, and a new log that it fills.

    Every builder, runtime and parser of a process needs this logger: the library uses the first one
    that it gets and ignores all others.
    """
    log = BuildLog()
    with _lock:
        _unclaimed.add(log)
        if id(module) not in _loggers:
            _loggers[id(module)] = (module, _make_logger(module))
        return _loggers[id(module)][1], log


def _make_logger(module: ModuleType) -> Any:  # noqa: ANN401, the library's own type
    base: Any = module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the binding takes no super()

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            _dispatch(int(severity), message)

    return Logger()


def _dispatch(severity: int, message: str) -> None:
    claimed = _claims.get(threading.get_ident())
    if claimed is not None:
        claimed.take(severity, message)
        return
    with _lock:
        taken = set(_claims.values())
        logs = [log for log in _unclaimed if log not in taken]
    for log in logs:
        log.take(severity, message)
