"""State over several calls, over every implementation, against numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import PARAMETERS, open_toy
from toy_states import APPENDED, CAPACITY, ENCODED, IN_PLACE, TOYS, WIDTH, Toy

from mmedge.errors import BackendError, DTypeError, InputError, ShapeError
from mmedge.runtimes import Session, StatefulRun
from mmedge.runtimes.fake import FakeSession
from mmedge.specs import Array, State, StateTensor


@pytest.fixture(params=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]


# Where the weights lie makes no difference to a state.
@pytest.fixture(params=[each for each in PARAMETERS if "external" not in str(each)])
def session(request: pytest.FixtureRequest, tmp_path: Path, toy: Toy) -> Iterator[Session]:
    with open_toy(request, request.param, tmp_path, toy) as made:
        yield made


def sequences(batch: int, length: int, seed: int = 0) -> Array:
    random = np.random.default_rng([seed, batch])
    return random.standard_normal((batch, length, WIDTH)).astype(np.float32)


def start(session: Session, toy: Toy, batch: int, **how: Any) -> StatefulRun:
    return session.start(toy.state, **{"batch": batch, "given": toy.constants(batch), **how})


def feed(toy: Toy, x: Array, held: int, capacity: int = CAPACITY) -> dict[str, Array]:
    return {"x": x, **toy.beside(held, x.shape[1], len(x), capacity)}


def steps(
    run: StatefulRun,
    toy: Toy,
    x: Array,
    parts: Sequence[int],
    capacity: int = CAPACITY,
    held: int | None = None,
) -> Array:
    """Feed sequences in parts and return y of all."""
    found, held = [], run.length if held is None else held
    for part, begin in zip(parts, np.cumsum([0, *parts]), strict=False):
        outputs = run.step(feed(toy, x[:, begin : begin + part], held + begin, capacity))
        assert list(outputs) == ["y"]
        found.append(outputs["y"])
    return np.concatenate(found, axis=1)


def same(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "parts"), [(1, (4, 1, 1, 2)), (3, (1, 1, 8)), (2, (5,))])
def test_parts_equal_the_whole(
    session: Session, toy: Toy, batch: int, parts: tuple[int, ...]
) -> None:
    x = sequences(batch, sum(parts))
    run = start(session, toy, batch)
    assert run.length == 0  # prefill: the past is empty

    got = steps(run, toy, x, parts)

    same(got, toy.whole(x, toy.constants(batch)))
    assert run.length == (sum(parts) if toy.state.length else 0)


def test_outputs_belong_to_the_caller_and_runs_are_independent(session: Session, toy: Toy) -> None:
    one, other = sequences(2, 6), sequences(2, 6, seed=1)
    given = toy.constants(2)
    first, second = start(session, toy, 2), start(session, toy, 2)

    kept = [steps(first, toy, one[:, :3], (3,)), steps(second, toy, other[:, :2], (1, 1))]
    copies = [array.copy() for array in kept]
    later = [steps(first, toy, one[:, 3:], (1, 2)), steps(second, toy, other[:, 2:], (4,))]

    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    for x, before, after in zip((one, other), kept, later, strict=True):
        same(np.concatenate([before, after], axis=1), toy.whole(x, given))


@pytest.mark.parametrize("rows", [[2, 0, 0, 1], [1]])
def test_sequences_are_reordered(session: Session, toy: Toy, rows: list[int]) -> None:
    x, new = sequences(3, 5), sequences(len(rows), 2, seed=1)
    given = toy.constants(3)
    run = start(session, toy, 3)
    steps(run, toy, x, (4, 1))

    run.reorder(np.array(rows))
    got = steps(run, toy, new, (1, 1))

    moved = {name: array[rows] for name, array in given.items()}
    same(got, toy.whole(np.concatenate([x[rows], new], axis=1), moved)[:, 5:])


@pytest.mark.parametrize("kept", [0, 2])
def test_positions_are_taken_back(session: Session, toy: Toy, kept: int) -> None:
    x, new = sequences(2, 5), sequences(2, 3, seed=1)
    given = toy.constants(2)
    run = start(session, toy, 2)
    steps(run, toy, x, (3, 2))

    if not toy.state.length:
        with pytest.raises(InputError, match=r"length: got 2, expected 0 to 0"):
            run.truncate(2)
        same(steps(run, toy, new, (3,)), toy.whole(np.concatenate([x, new], 1), given)[:, 5:])
        return
    run.truncate(kept)

    assert run.length == kept
    whole = np.concatenate([x[:, :kept], new], axis=1)
    same(steps(run, toy, new, (1, 2)), toy.whole(whole, given)[:, kept:])


@pytest.mark.parametrize("capacity", [None, 8])
def test_a_saved_state_begins_another_run(session: Session, toy: Toy, capacity: int | None) -> None:
    x, given = sequences(2, 6), toy.constants(2)
    run = start(session, toy, 2)
    steps(run, toy, x[:, :4], (3, 1))
    saved = run.save()
    copies = {name: array.copy() for name, array in saved.items()}
    expected = toy.whole(x, given)[:, 4:]
    same(steps(run, toy, x[:, 4:], (2,)), expected)
    run.close()

    for _ in range(2):  # it can be used again
        with start(session, toy, 2, given=saved, capacity=capacity) as again:
            assert again.length == (4 if toy.state.length else 0)
            same(steps(again, toy, x[:, 4:], (1, 1), capacity or CAPACITY), expected)
    for name, array in copies.items():
        np.testing.assert_array_equal(saved[name], array)


def test_a_refused_step_leaves_the_run_unchanged(session: Session, toy: Toy) -> None:
    x, given = sequences(2, 8), toy.constants(2)
    run = start(session, toy, 2, capacity=8)
    good = feed(toy, x[:, :3], 0, 8)
    before = run.step(good)["y"]
    wrong: list[tuple[dict[str, Array], type[InputError]]] = [
        ({}, InputError),
        (good | {"more": good["x"]}, InputError),
        (good | {toy.state.tensors[0].input: good["x"]}, InputError),
        (good | {"x": good["x"].astype(np.float64)}, DTypeError),
        (good | {"x": good["x"][:1]}, ShapeError),
        (good | {"x": good["x"][:, :0]}, ShapeError),
        (good | {"x": good["x"][..., :1]}, ShapeError),
    ]
    if toy.state.length:
        wrong.append((feed(toy, x[:, :6], 3, 8), ShapeError))  # past the capacity
    for bad, kind in wrong:
        with pytest.raises(kind):
            run.step(bad)
    for rows in ([2], [-1], [], [[0, 1]], [0.5]):
        with pytest.raises(InputError, match="rows"):
            run.reorder(np.array(rows))
    for length in (-1, 9):
        with pytest.raises(InputError, match="length"):
            run.truncate(length)

    after = steps(run, toy, x[:, 3:], (1, 4), 8)
    same(np.concatenate([before, after], axis=1), toy.whole(x, given))


def test_arrays_that_are_not_contiguous_are_taken(session: Session, toy: Toy) -> None:
    x = np.asfortranarray(sequences(3, 4))
    run = start(session, toy, 3)
    same(steps(run, toy, x, (3, 1)), toy.whole(x, toy.constants(3)))


def test_a_closed_run_refuses(session: Session, toy: Toy) -> None:
    good = feed(toy, sequences(1, 2), 0)
    run, other = start(session, toy, 1), start(session, toy, 1)

    run.close()
    run.close()
    for use in (lambda: run.step(good), lambda: run.reorder(np.array([0])), run.save):
        with pytest.raises(BackendError, match=r"state is closed. Start another"):
            use()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        other.step(good)
    with pytest.raises(BackendError, match="closed"):
        start(session, toy, 1)
    other.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=8,
)


@pytest.mark.parametrize("name", ["ort", "openvino", "trt", "fake"])
@pytest.mark.parametrize("kind", TOYS)
def test_any_order_of_operations_equals_the_whole(
    name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    toy = TOYS[kind]
    with open_toy(request, name, tmp_path, toy) as session:

        @settings(max_examples=30, deadline=None)
        @given(OPERATIONS, st.integers(1, 3))
        def check(operations: list[tuple[str, Any]], batch: int) -> None:
            x, given = sequences(batch, 0), toy.constants(batch)
            run = start(session, toy, batch)
            for seed, (operation, how) in enumerate(operations):
                if operation == "step" and x.shape[1] + how <= CAPACITY:
                    x = np.concatenate([x, sequences(len(x), how, seed)], axis=1)
                    y = steps(run, toy, x[:, -how:], (how,), held=x.shape[1] - how)
                    same(y, toy.whole(x, given)[:, -how:])
                elif operation == "truncate" and toy.state.length:
                    x = x[:, : int(how * x.shape[1])]
                    run.truncate(x.shape[1])
                elif operation == "reorder":
                    rows = np.array(how) % len(x)
                    x, given = x[rows], {key: array[rows] for key, array in given.items()}
                    run.reorder(rows)
                elif operation == "restart":
                    saved = run.save()
                    run.close()
                    run = start(session, toy, len(x), given=saved)
                assert run.length == (x.shape[1] if toy.state.length else 0)

        check()


# What no engine has a part in.


def fake(toy: Toy) -> FakeSession:
    return FakeSession(toy.inputs, toy.outputs, toy.compute)


@pytest.mark.parametrize(
    ("toy", "how", "message"),
    [
        (ENCODED, {"given": {}}, r"given: memory float32\(.*missing, which encoder makes"),
        (ENCODED, {"given": ENCODED.constants(3)}, "'memory': got .* Axis 'batch' is 2 elsewhere"),
        (APPENDED, {"given": {"past.0.keys": 0}}, r"no state.*Did you mean past\.0\.key"),
        (APPENDED, {"given": {"past.0.key": [1]}}, "'past.0.key': got list"),
        (APPENDED, {"given": {"past.0.key": np.zeros((2, 1, 4), np.float32)}}, "none of them"),
        (
            APPENDED,
            {"given": {f"past.0.{w}": np.zeros((2, 1, 4)) for w in ("key", "value")}},
            "got dtype float64",
        ),
        (APPENDED, {"capacity": 0}, "capacity: got 0 .* from 1 to 12"),
        (IN_PLACE, {"capacity": 13}, "capacity: got 13 .* from 1 to 12"),
        (
            IN_PLACE,
            {"given": {"buffer": np.zeros((2, 9, WIDTH), np.float32)}, "capacity": 8},
            "capacity: got 8 for a state of 9 positions, expected a number from 9 to 12",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(toy: Toy, how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(fake(toy), toy, 2, **how)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (StateTensor("past", "present.0.key", "append", 1), "no 'past', expected"),
        (StateTensor("past.0.key", "present", "append", 1), "no 'present', expected"),
        (StateTensor("past.0.key", None, "append", 1), "got output None for the update 'append'"),
        (StateTensor("past.0.key", "present.0.key", "constant"), "every update but 'constant'"),
        (StateTensor("past.0.key", "present.0.key", "append"), "got axis None"),
        (StateTensor("past.0.key", "present.0.key", "append", 3), "got axis 3"),
        (StateTensor("past.0.key", "present.0.key", "append", 2), "axis 2 has a fixed size"),
    ],
)
def test_a_state_of_another_graph_is_refused(tensor: StateTensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fake(APPENDED).start(State((tensor,), "past", 8))


def test_a_capacity_is_needed_where_something_grows() -> None:
    state = replace(APPENDED.state, capacity=None)
    with pytest.raises(InputError, match="capacity: got None"):
        fake(APPENDED).start(state)
    assert fake(APPENDED).start(state, capacity=10**6).length == 0


def test_a_buffer_of_the_graphs_own_size_bounds_the_capacity() -> None:
    inputs, outputs = (
        tuple(
            replace(spec, shape=tuple(6 if dim == "slots" else dim for dim in spec.shape))
            for spec in specs
        )
        for specs in (IN_PLACE.inputs, IN_PLACE.outputs)
    )
    x = sequences(1, 6)
    run = FakeSession(inputs, outputs, IN_PLACE.compute).start(IN_PLACE.state, capacity=5)
    same(steps(run, IN_PLACE, x[:, :5], (4, 1), 6), IN_PLACE.whole(x, {})[:, :5])
    with pytest.raises(ShapeError, match="holds 5 positions and takes 5, got 1 new"):
        run.step(feed(IN_PLACE, x[:, 5:], 5, 6))


def test_an_output_that_is_not_the_state_is_named() -> None:
    state = replace(APPENDED.state, new="tokens")
    run = fake(APPENDED).start(state)
    with pytest.raises(
        BackendError, match=r"'present.0.key' has shape \(1, 3, 4\), expected .1, 1"
    ):
        run.step(feed(APPENDED, sequences(1, 3), 0))
    assert run.length == 0


def test_a_failed_step_leaves_the_state() -> None:
    x = sequences(1, 4)
    session = FakeSession(
        APPENDED.inputs, APPENDED.outputs, APPENDED.compute, failures=(None, BackendError("lost"))
    )
    run = session.start(APPENDED.state)
    steps(run, APPENDED, x, (3,))
    with pytest.raises(BackendError, match="lost"):
        run.step(feed(APPENDED, x[:, 3:], 3))
    assert run.length == 3
    same(steps(run, APPENDED, x[:, 3:], (1,)), APPENDED.whole(x, {})[:, 3:])
