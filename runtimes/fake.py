"""A Session without an engine, for tests of code that uses mmedge.

It checks its feed as every backend does, has deterministic outputs, records its calls and fails on
demand. As the backend "fake" it opens any bundle:

```python
clip = mmedge.load("clip.mmedge", backend="fake")      # real specs, synthetic embeddings

session = FakeSession(
    inputs=(TensorSpec("x", np.dtype("float32"), ("batch", 8)),),
    outputs=(TensorSpec("y", np.dtype("float32"), ("batch", 4)),),
    failures=(None, BackendError("the GPU fell off the bus")),   # the second run fails
)
```
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mmedge.errors import BackendError, BackendUnavailableError, MmedgeError
from mmedge.runtimes.backends import Backend
from mmedge.runtimes.base import SessionBase
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.specs import Array, Axis, TensorSpec, dim_size

__all__ = ["BACKEND", "FakeBackend", "FakeFunction", "FakeSession"]

FakeFunction: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class FakeBackend(Backend):
    """Backend that opens any bundle and computes nothing."""

    name = "fake"
    title = "Fake"

    def engine_version(self) -> None:
        """Return None: no engine, so it is never chosen."""

    def layouts(self, device: str) -> tuple[str, ...]:  # noqa: ARG002
        """Return every layout: no operator is computed."""
        return ("portable", "onnxruntime")

    def available_devices(self) -> tuple[str, ...]:
        """Return ("cpu",): the fake needs nothing."""
        return ("cpu",)

    def open_session(self, model: Path, options: SessionOptions) -> FakeSession:
        """Return a fake session with the specs of an ONNX file, without reading weights.

        Args:
            model: The ONNX file.
            options: Only `device` and `axes` are used.

        Raises:
            BackendUnavailableError: If the device is not "cpu".
            BackendError: If the file or its external data is missing or damaged.
        """
        if options.device != "cpu":
            raise BackendUnavailableError(
                f"The fake backend has no device '{options.device}': expected 'cpu'."
            )
        graph = read_onnx_file(model)
        check_external_data(model, graph)
        return FakeSession(graph.inputs, graph.outputs, axes=options.axes)


BACKEND = FakeBackend()


class FakeSession(SessionBase[FakeFunction]):
    """A Session whose outputs are drawn or given.

    Args:
        inputs: Input specs.
        outputs: Output specs. A dynamic axis that no input names has size 1.
        function: From a feed to the outputs. None: float outputs are unit vectors along the last
            axis, drawn from a hash of the inputs, so that equal inputs give equal outputs, row by
            row of a shared leading axis ("batch") however the rows are split into calls.
        latency_ms: How long each run sleeps.
        failures: One entry per run, in order: an error to raise, or None to succeed. Later runs
            succeed.
        axes: Bounds of dynamic axes, see SessionOptions.

    Attributes:
        calls: A copy of every feed that was run, failed runs included.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: FakeFunction | None = None,
        *,
        latency_ms: float = 0.0,
        failures: Iterable[MmedgeError | None] = (),
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        takes, gives = tuple(inputs), tuple(outputs)
        drawn = partial(_drawn, takes, gives)
        placement = Placement("fake", "cpu", "fake")
        super().__init__(function or drawn, Path("fake"), takes, gives, placement, axes)
        self.calls: list[dict[str, Array]] = []
        self._latency_ms = latency_ms
        self._failures = iter(tuple(failures))

    def _run(self, engine: FakeFunction, feed: Mapping[str, Array]) -> dict[str, Array]:
        if self._latency_ms:
            time.sleep(self._latency_ms / 1e3)
        with self._lock:
            self.calls.append({name: array.copy() for name, array in feed.items()})
            failure = next(self._failures, None)
        if failure is not None:
            raise failure
        outputs = dict(engine(feed))
        for spec in self._outputs:
            got = outputs.get(spec.name)
            if got is None or got.dtype != spec.dtype or got.ndim != len(spec.shape):
                shown = "nothing" if got is None else f"{got.dtype.name}{got.shape}"
                raise BackendError(
                    f"Fake output '{spec.name}': function gave {shown}, expected {spec}."
                )
        return outputs


def _drawn(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], feed: Mapping[str, Array]
) -> dict[str, Array]:
    sizes = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    return {spec.name: _drawn_output(spec, inputs, feed, sizes) for spec in outputs}


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    known = (dim_size(dim, sizes) for dim in spec.shape)
    return tuple(1 if size is None else size for size in known)


def _drawn_output(
    spec: TensorSpec,
    inputs: tuple[TensorSpec, ...],
    feed: Mapping[str, Array],
    sizes: Mapping[str, int],
) -> Array:
    """Draw one output, seeded by a hash of the inputs."""
    shape = _shape(spec, sizes)
    lead = spec.shape[0] if spec.shape else None
    if not isinstance(lead, str) or lead not in sizes:
        return _draw(spec, shape, [feed[i.name] for i in inputs])
    by_row = {i.name for i in inputs if i.shape and i.shape[0] == lead}
    rows = [
        _draw(
            spec,
            shape[1:],
            [feed[i.name][row] if i.name in by_row else feed[i.name] for i in inputs],
        )
        for row in range(shape[0])
    ]
    return np.stack(rows)


def _draw(spec: TensorSpec, shape: tuple[int, ...], seeds: Sequence[Array]) -> Array:
    digest = hashlib.sha256(spec.name.encode())
    for seed in seeds:
        digest.update(str(seed.shape).encode())
        digest.update(np.ascontiguousarray(seed).data)
    random = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little"))
    if spec.dtype.kind == "f":
        drawn = random.standard_normal(shape)
        if shape:
            drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
        return np.asarray(drawn, spec.dtype)
    return random.integers(0, 2 if spec.dtype.kind == "b" else 100, shape).astype(spec.dtype)
