"""What sessions of several backends do alike. A backend may build on it, and need not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.session import Placement, Session
from mmedge.specs import Array, TensorSpec, check_bindable

__all__ = ["BindingBase", "SessionBase", "closed_error"]


class SessionBase(Session):
    """A Session that has been told what it is.

    Args:
        inputs: Input specs, in the graph's order.
        outputs: Output specs, in the graph's order.
        placement: What really runs where.
    """

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], placement: Placement
    ) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._placement = placement

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Input specs, in the graph's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Output specs, in the graph's order."""
        return self._outputs

    @property
    def placement(self) -> Placement:
        """What really runs where."""
        return self._placement

    def _buffers(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Return arrays for the answers to a feed of these shapes, by output.

        An output axis that the inputs do not name is found by running the graph once.

        Raises:
            InputError: If the feed cannot be bound.
            BackendError: If the run fails.
        """
        sizes = check_bindable(self._inputs, feed)
        if all(isinstance(n, int) or n in sizes for spec in self._outputs for n in spec.shape):
            return {
                spec.name: np.empty(
                    tuple(n if isinstance(n, int) else sizes[n] for n in spec.shape), spec.dtype
                )
                for spec in self._outputs
            }
        return {name: np.empty_like(array) for name, array in self.run(feed).items()}


class BindingBase:
    """A Binding's arrays.

    Args:
        inputs: Input buffers by name.
        outputs: Output buffers by name.
    """

    def __init__(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self._inputs = inputs
        self._outputs = outputs

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Input buffers by name, to be written in place."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Output buffers by name, overwritten by every run."""
        return self._outputs


def closed_error(model: Path) -> BackendError:
    """Return what is raised when a closed session is run."""
    return BackendError(f"{model}: the session is closed. Open another with open_session.")
