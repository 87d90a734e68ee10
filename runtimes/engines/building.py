"""EngineBuilder: the interface of backends that build engines ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mmedge.runtimes.engines.files import LoadedEngine
from mmedge.runtimes.engines.spec import BuildHost, EngineKey
from mmedge.runtimes.session import BuildProgress

__all__ = ["EngineBuilder"]


class EngineBuilder(Protocol):
    """Builder of engines from ONNX files in standard operators.

    Attributes:
        runs_on: Kind of device that its engines run on, such as "cuda".
    """

    runs_on: str

    def host(self, targets: Sequence[str] = (), device: int = 0) -> BuildHost:
        """Return the build host.

        Args:
            targets: Compute capabilities, see EngineRequest; none for the GPU of this machine.
            device: Number of that GPU.

        Raises:
            BackendUnavailableError: If the library is not installed, or there is no GPU.
            EngineBuildError: If it does not build for a target.
        """
        ...

    def targets(self, named: Sequence[str], precision: str) -> tuple[str, ...]:
        """Return the target compute capabilities, ascending; empty means this machine's GPU.

        Args:
            named: See EngineRequest; "any" means all that can compute `precision`.
            precision: What the graph computes in.

        Raises:
            EngineBuildError: If one of them does not compute `precision`.
        """
        ...

    def build(
        self,
        model: Path,
        key: EngineKey,
        *,
        device: int = 0,
        progress: BuildProgress | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> LoadedEngine:
        """Return the engine of a key from the cache, building it on a miss.

        Args:
            model: The ONNX file.
            key: What the engine is found by.
            device: Number of the GPU to build for, where the key names no target.
            progress: Called with the phase of the build and its steps.
            on_wait: Called with what is waited for while another process builds the same; None
                hands it to `progress`, as a phase.

        Raises:
            EngineBuildError: If it cannot be built.
            BackendError: If the model is damaged.
            StorageError: If the cache's folder cannot be written, which is seen before the build,
                or others may write it.
        """
        ...
