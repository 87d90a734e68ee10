"""The fake: synthetic outputs, recorded calls, failures on demand."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_graphs import INPUTS, OUTPUTS, embed, feed_of, save_embedder

from mmedge.errors import BackendError, BackendUnavailableError, PlacementError, ShapeError
from mmedge.runtimes import SessionOptions, open_session
from mmedge.runtimes.fake import FakeSession
from mmedge.specs import Array, TensorSpec


def _one_output(dtype: str, shape: tuple[int | str, ...]) -> FakeSession:
    return FakeSession(INPUTS, (TensorSpec("y", np.dtype(dtype), shape),))


def test_embeddings_are_unit_vectors_that_depend_on_their_own_row_alone() -> None:
    session = FakeSession(INPUTS, OUTPUTS)
    feed = feed_of(5)

    together = session.run(feed)["y"]
    alone = [
        session.run({name: array[row : row + 1] for name, array in feed.items()})["y"][0]
        for row in range(5)
    ]

    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-6)
    assert len({row.tobytes() for row in together}) == 5


def test_outputs_are_the_same_in_every_session_and_change_with_any_input() -> None:
    feed = feed_of(2)
    first = FakeSession(INPUTS, OUTPUTS).run(feed)
    again = FakeSession(INPUTS, OUTPUTS).run(feed)

    np.testing.assert_array_equal(first["y"], again["y"])
    assert not np.array_equal(first["y"][:, :1], first["norm"])
    for name in feed:
        changed = {**feed, name: feed[name] + np.ones_like(feed[name])}
        assert not np.array_equal(FakeSession(INPUTS, OUTPUTS).run(changed)["y"], first["y"])


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("float16", ("batch", 3, 4), (2, 3, 4)),
        ("float32", (7, 4), (7, 4)),
        ("int64", ("batch",), (2,)),
        ("bool", ("batch", 6), (2, 6)),
        ("float32", ("tokens", "batch"), (1, 2)),
        ("float32", (), ()),
    ],
)
def test_outputs_of_every_shape_and_dtype(
    dtype: str, shape: tuple[int | str, ...], expected: tuple[int, ...]
) -> None:
    with _one_output(dtype, shape) as session:
        got = session.run(feed_of(2))["y"]
        bound = session.bind(feed_of(2)).run()["y"]

    assert got.shape == expected
    assert got.dtype == dtype
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(bound, got)


def test_calls_are_remembered_as_they_were() -> None:
    session = FakeSession(INPUTS, OUTPUTS)
    feed = feed_of(2)
    session.run(feed)
    feed["x"][:] = 0.0
    with pytest.raises(ShapeError):
        session.run({**feed, "x": feed["x"][:, :3]})

    (call,) = session.calls  # a refused feed never ran
    np.testing.assert_array_equal(call["x"], feed_of(2)["x"])


def test_failures_come_in_their_turn() -> None:
    session = FakeSession(
        INPUTS, OUTPUTS, embed, failures=(None, BackendError("fell off"), PlacementError("moved"))
    )
    feed = feed_of(1)

    session.run(feed)
    with pytest.raises(BackendError, match="fell off"):
        session.run(feed)
    with pytest.raises(PlacementError, match="moved"):
        session.run(feed)
    np.testing.assert_array_equal(session.run(feed)["y"], embed(feed)["y"])
    assert len(session.calls) == 4


def test_a_failure_is_raised_once_among_threads() -> None:
    session = FakeSession(INPUTS, OUTPUTS, failures=[BackendError("once")])

    def fails(seed: int) -> bool:
        try:
            session.run(feed_of(1, seed))
        except BackendError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(fails, range(40))) == 1
    assert len(session.calls) == 40


def test_latency_is_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    FakeSession(INPUTS, OUTPUTS, latency_ms=12.5).run(feed_of(1))

    assert slept == [0.0125]


@pytest.mark.parametrize(
    "output",
    [
        {"y": np.ones((2, 4), np.float32)},
        {"y": np.ones((2, 4)), "norm": np.ones((2, 1), np.float32)},
        {"y": np.ones(4, np.float32), "norm": np.ones((2, 1), np.float32)},
    ],
    ids=["missing", "dtype", "rank"],
)
def test_a_function_that_breaks_the_specs_is_named(output: dict[str, Array]) -> None:
    session = FakeSession(INPUTS, OUTPUTS, lambda _: output)

    with pytest.raises(BackendError, match=r"Fake output '(y|norm)'.*expected (y|norm) float32"):
        session.run(feed_of(2))


def test_a_bound_function_may_not_change_its_shape() -> None:
    rows = [2]
    session = FakeSession(
        INPUTS,
        (TensorSpec("y", np.dtype(np.float32), ("found",)),),
        lambda _: {"y": np.zeros(rows[0], np.float32)},
    )
    binding = session.bind(feed_of(1))
    assert binding.run()["y"].shape == (2,)

    rows[0] = 3
    with pytest.raises(BackendError, match=r"'y'.*\(3,\).*\(2,\)"):
        binding.run()


def test_the_backend_has_no_device_but_the_cpu(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")

    with pytest.raises(BackendUnavailableError, match=r"'cuda'.*'cpu'"):
        open_session(model, backend_name="fake", options=SessionOptions(device="cuda"))
