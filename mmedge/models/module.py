"""Module: any graph with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmedge.bundle.kinds import ModuleKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.errors import InputError
from mmedge.models.base import Model
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.runtimes.session import Session
from mmedge.specs import Array, did_you_mean

__all__ = ["Module"]


class Module(Model):
    """A user's own module or ONNX graph.

    policy = mmedge.load("policy.mmedge")
    policy({"observation": observation, "goal": goal})["action"]
    """

    kind = "module"

    @property
    def session(self) -> Session:
        """The graph's session."""
        kind = self.manifest.kind
        assert isinstance(kind, ModuleKind)  # noqa: S101, the registry's
        return self._session(kind.role)

    @property
    def runs(self) -> Mapping[str, Run]:
        """Run the graph."""
        arrays = frozenset({"arrays"})
        return {"run": Run(self._run_arrays, arrays, arrays)}

    def _run_arrays(self, given: Given, settings: Settings) -> Made:  # noqa: ARG002
        made = self(given.arrays)
        rows = [
            {"output": name, "dtype": array.dtype.name, "shape": list(array.shape)}
            for name, array in made.items()
        ]
        return Made(rows, made)

    def __call__(self, inputs: Mapping[str, Array | Sequence[Any]]) -> dict[str, Array]:
        """Run the module.

        Args:
            inputs: Arrays by input of the graph, in any dtype that converts; or a list of raw items
                (image paths, texts, vectors) by the name of a processor.

        Returns:
            Outputs by name.

        Raises:
            InputError: If an input is missing, unknown, or of another shape.
            BackendError: If the engine fails, or the model is closed.
        """
        kind = self.manifest.kind
        assert isinstance(kind, ModuleKind)  # noqa: S101, the registry's
        entries = self.manifest.roles[kind.role].inputs
        known = {entry.name for entry in entries}
        known |= {e.feed.processor for e in entries if isinstance(e.feed, ProcessorFeed)}
        feed: dict[str, Array] = {}
        for name, value in inputs.items():
            if name not in known:
                raise InputError(
                    f"Unknown input '{name}', expected {sorted(known)}." + did_you_mean(name, known)
                )
            if name in self._processors:
                feed |= self._processors[name](list(value))
            else:
                feed[name] = value  # type: ignore[assignment]  # checked by the session
        return self._run(kind.role, feed)
