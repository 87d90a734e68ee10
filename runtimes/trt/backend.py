"""What the two TensorRT backends share. Telling what is installed loads next to nothing.

What each of SessionOptions comes to here:

- `device`: "cuda" or "cuda:N". An engine runs on the GPU whole, or not at all.
- `axes`: the engine is built for these sizes of the dynamic axes; a graph that has such axes cannot
  be opened without. Loading a bundle takes them from its manifest.
- `engine`: see EngineOptions.
- `spin`: off, a caller sleeps while the GPU works, instead of asking it without pause.
- `threads`: the GPU needs none.
- `arena`, `prepack`, `graph_optimization`, `profile_to`: TensorRT has no such switches, so anything
  but the default is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.errors import BackendError
from mmedge.runtimes.session import BuildProgress, SessionOptions
from mmedge.runtimes.trt.engines import device_index

if TYPE_CHECKING:
    from mmedge.runtimes.trt.engines import Flavour
    from mmedge.runtimes.trt.session import TrtSession

__all__ = [
    "TrtBackend",
]


class TrtBackend:
    """The functions of a Backend module, for one flavour.

    Args:
        flavour: Of TensorRT.
    """

    def __init__(self, flavour: Flavour) -> None:
        self._flavour = flavour

    def engine_version(self) -> str | None:
        """Return the version of the installed TensorRT, without loading it; None if none is."""
        from mmedge.runtimes.trt.flavours import installed_version

        found = installed_version(self._flavour)
        return found if found is None else found or "of an unknown version"

    def layouts(self, device: str) -> tuple[str, ...]:
        """Return ("portable",) for a GPU: the other layout holds operators of ONNX Runtime."""
        return () if device_index(device) is None else ("portable",)

    def available_devices(self) -> tuple[str, ...]:
        """Return "cuda", "cuda:1", ... for every GPU. Neither raises nor prints."""
        from mmedge.runtimes.cuda.runtime import bindings_installed, device_count

        if self.engine_version() is None or not bindings_installed():
            return ()
        try:
            count = device_count()
        except BackendError:
            return ()
        return tuple("cuda" if index == 0 else f"cuda:{index}" for index in range(count))

    def is_prepared(self, model: Path, options: SessionOptions) -> bool:
        """Tell whether the engine of a graph is in the cache; see Backend.is_prepared."""
        if self.engine_version() is None:
            return False
        from mmedge.runtimes.trt.opening import is_prepared

        return is_prepared(self._flavour, model, options)

    def prepare(
        self, model: Path, options: SessionOptions, progress: BuildProgress | None = None
    ) -> None:
        """Build the engine of a graph into the cache, unless it is there; see Backend.prepare.

        Raises:
            BackendUnavailableError, BackendError, InputError: As open_session.
            EngineBuildError: If it cannot be built.
            StorageError: If the cache's folder cannot be written, or others may write it.
        """
        from mmedge.runtimes.trt.opening import prepare_engine

        prepare_engine(self._flavour, model, options, progress)

    def open_session(self, model: Path, options: SessionOptions) -> TrtSession:
        """Open an ONNX file: find its engine in the cache, or build it, and load it.

        A build takes minutes; how far it is goes to the logger "mmedge.engines".

        Args:
            model: The ONNX file; its external data must lie beside or below it.
            options: How to run it; see this module for what each comes to.

        Raises:
            BackendUnavailableError: If TensorRT, CUDA's bindings, the driver or the GPU is missing,
                or an option is not to be had here.
            BackendError: If the file is missing or damaged, or memory runs out.
            EngineMismatchError: If the engine in the cache does not load here.
            EngineBuildError: If there is no engine and it cannot be built.
            InputError: If a dynamic axis has no bounds.
            StorageError: If others may write the cache's folder.
        """
        from mmedge.runtimes.trt.opening import open_engine

        return open_engine(self._flavour, model, options)
