"""A feed in several calls gives what it gives at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_states import AXES, CAPACITY, TOYS, WIDTH

from mmedge.runtimes import SessionOptions, open_session
from mmedge.runtimes.steps import run_steps


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("name", TOYS)
def test_a_prefill_and_two_steps_are_the_whole(name: str, length: int, tmp_path: Path) -> None:
    toy, batch = TOYS[name], 2
    x = np.random.default_rng(length).standard_normal((batch, length, WIDTH)).astype(np.float32)
    constants = toy.constants(batch)
    feed = {"x": x, **toy.beside(0, length, batch, CAPACITY), **constants}
    path = toy.save(tmp_path / "model.onnx")
    with open_session(path, options=SessionOptions(axes=AXES)) as session:
        outputs = run_steps(session, toy.state, feed)
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], toy.whole(x, constants), rtol=1e-4, atol=1e-5)
