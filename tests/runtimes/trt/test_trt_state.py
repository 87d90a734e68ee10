"""What crosses between host and GPU while a state grows: inputs, outputs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu
from toy_states import AXES, TOYS, WIDTH, Toy

from mmedge.runtimes import StatefulRun
from mmedge.specs import Array


def step(run: StatefulRun, toy: Toy, x: Array) -> dict[str, Array]:
    feed = {"x": x, **toy.beside(run.length, x.shape[1], len(x), toy.state.capacity or 0)}
    run.step(feed)
    return feed


@pytest.mark.parametrize("name", TOYS)
def test_state_does_not_cross_the_host(name: str, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    toy = TOYS[name]
    x = np.ones((2, 1, WIDTH), np.float32)
    session = fake_gpu.open(toy.save(tmp_path / "m.onnx"), axes=AXES)
    with session, session.start(toy.state, batch=2, given=toy.constants(2)) as run:
        step(run, toy, x)
        copied = fake_gpu.cuda.copied
        copied.clear()
        feed = step(run, toy, x)
        assert copied["to device"] == sum(array.nbytes for array in feed.values())
        assert copied["to host"] == toy.whole(x, toy.constants(2)).astype(np.float32).nbytes

        copied.clear()
        run.reorder(np.array([1, 1, 0]))
        first = {spec.name: spec.shape[0] for spec in toy.inputs}
        assert bool(copied["to host"]) == any(
            first[tensor.input] != "batch" for tensor in toy.state.tensors
        )
        assert bool(copied["on device"]) != bool(copied["to host"])
