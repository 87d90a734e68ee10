"""The Session contract, over every implementation. A new one is one line in implementations.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from implementations import PARAMETERS, open_toy
from tiny_graphs import DIM, INPUTS, OUTPUTS, WEIGHT, embed, feed_of, save_embedder
from toy_states import AXES

from mmedge.errors import (
    BackendError,
    DTypeError,
    InputError,
    MmedgeError,
    ShapeError,
)
from mmedge.runtimes import (
    BACKENDS,
    Session,
    SessionOptions,
    backend,
    open_session,
)
from mmedge.specs import Array


@pytest.fixture(params=PARAMETERS)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    made = open_toy(request, request.param, tmp_path)
    yield made
    made.close()


def _assert_outputs(got: dict[str, Array], feed: dict[str, Array]) -> None:
    for name, expected in embed(feed).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


def test_specs_are_those_of_the_graph(session: Session) -> None:
    assert isinstance(session, Session)
    assert session.inputs == INPUTS
    assert session.outputs == OUTPUTS


@pytest.mark.parametrize("batch", range(1, 6))
def test_outputs_at_every_batch(session: Session, batch: int) -> None:
    feed = feed_of(batch)

    got = session.run(feed)

    assert list(got) == ["y", "norm"]
    assert got["y"].shape == (batch, DIM)
    assert got["y"].dtype == np.float32
    _assert_outputs(got, feed)


def test_outputs_belong_to_the_caller(session: Session) -> None:
    feed = feed_of(3)
    first = session.run(feed)
    kept = {name: array.copy() for name, array in first.items()}

    second = session.run(feed_of(3, seed=1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        assert not np.shares_memory(array, second[name])
        array[:] = 0.0  # writeable, and nothing of the session's
    _assert_outputs(session.run(feed), feed)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda feed: feed.pop("gate"), InputError, "gate"),
        (lambda feed: feed.update(other=feed["x"]), InputError, "other"),
        (lambda feed: feed.update(x=feed["x"].tolist()), InputError, "list"),
        (lambda feed: feed.update(x=feed["x"].astype(np.float64)), DTypeError, "float64"),
        (lambda feed: feed.update(x=feed["x"].astype(">f4")), DTypeError, "x"),
        (lambda feed: feed.update(gate=feed["gate"].astype(np.int32)), DTypeError, "int32"),
        (lambda feed: feed.update(x=feed["x"][0]), ShapeError, "axes"),
        (lambda feed: feed.update(x=feed["x"][:, 1:]), ShapeError, r"\(2, 7\)"),
        (lambda feed: feed.update(x=feed["x"][:1]), ShapeError, "batch"),
        (lambda feed: feed.update(x=feed["x"][:0], gate=feed["gate"][:0]), ShapeError, "batch"),
    ],
    ids=["missing", "unknown", "list", "float64", "swapped", "int32", "rank", "axis", "two", "0"],
)
@pytest.mark.parametrize("method", ["run", "bind"])
def test_a_wrong_feed_is_refused(
    session: Session,
    method: str,
    change: Callable[[dict[str, Array]], object],
    kind: type[InputError],
    message: str,
) -> None:
    feed = feed_of(2)
    change(feed)

    with pytest.raises(kind, match=message):
        getattr(session, method)(feed)
    _assert_outputs(session.run(feed_of(2)), feed_of(2))


def _strided(array: Array) -> Array:
    return np.repeat(array, 2, axis=0)[::2]


def _unaligned(array: Array) -> Array:
    raw = np.empty(array.nbytes + 1, np.uint8)[1:]
    raw[:] = np.frombuffer(array.tobytes(), np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def _read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("lay_out", [_strided, _unaligned, _read_only, np.asfortranarray])
def test_memory_layout_does_not_change_the_outputs(
    session: Session, lay_out: Callable[[Array], Array]
) -> None:
    feed = feed_of(4)
    odd = {name: lay_out(array) for name, array in feed.items()}

    _assert_outputs(session.run(odd), feed)
    for name, array in odd.items():
        np.testing.assert_array_equal(array, feed[name])


def test_a_binding_reads_and_writes_the_same_memory_every_time(session: Session) -> None:
    feed, other = feed_of(3), feed_of(3, seed=1)
    buffers = {name: array.copy() for name, array in feed.items()}

    binding = session.bind(buffers)
    addresses = {name: array.ctypes.data for name, array in binding.outputs.items()}
    outputs = dict(binding.outputs)
    results = binding.run()

    assert all(binding.inputs[name] is buffers[name] for name in buffers)
    _assert_outputs(dict(results), feed)
    for name, array in other.items():
        buffers[name][...] = array  # the binding must read this memory
    results = binding.run()
    _assert_outputs(dict(results), other)
    for name, address in addresses.items():
        assert results[name] is outputs[name]
        assert binding.outputs[name] is outputs[name]
        assert outputs[name].ctypes.data == address


def test_bindings_and_runs_do_not_disturb_each_other(session: Session) -> None:
    feeds = [feed_of(batch) for batch in (1, 4, 2)]
    bindings = [session.bind(feed) for feed in feeds]

    for _ in range(2):
        for binding in bindings:
            binding.run()
            session.run(feed_of(5))
        for feed, binding in zip(feeds, bindings, strict=True):
            _assert_outputs(dict(binding.outputs), feed)


@pytest.mark.parametrize("lay_out", [_strided, _unaligned, np.asfortranarray])
def test_memory_that_would_need_a_copy_cannot_be_bound(
    session: Session, lay_out: Callable[[Array], Array]
) -> None:
    feed = feed_of(3)
    feed["x"] = lay_out(feed["x"])

    with pytest.raises(InputError, match=r"'x'.*ascontiguousarray"):
        session.bind(feed)


def test_a_closed_session_refuses(session: Session) -> None:
    binding = session.bind(feed_of(2))

    session.close()
    session.close()

    for use in (lambda: session.run(feed_of(2)), lambda: session.bind(feed_of(2)), binding.run):
        with pytest.raises(BackendError, match="closed"):
            use()
    assert session.inputs == INPUTS


def test_leaving_the_context_closes_and_lets_errors_through(session: Session) -> None:
    def fail_inside() -> None:
        with session as entered:
            assert entered is session
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_inside()

    with pytest.raises(BackendError, match="closed"):
        session.run(feed_of(1))


def test_threads_get_the_outputs_of_one_thread(session: Session) -> None:
    feeds = [feed_of(1 + n % 5, seed=n) for n in range(64)]
    alone = [session.run(feed) for feed in feeds]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(session.run, feeds))

    for one, other in zip(alone, together, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)


@pytest.mark.parametrize("bound", [False, True], ids=["run", "binding"])
def test_closing_while_others_run_gives_outputs_or_backend_errors(
    session: Session, bound: bool
) -> None:
    begun = threading.Barrier(5)
    wrong: list[object] = []
    refusals: list[str] = []

    def call_until_closed(seed: int) -> int:
        feed = feed_of(2, seed)
        run = session.bind(feed).run if bound else lambda: session.run(feed)
        expected = embed(feed)["y"]
        begun.wait(timeout=30)
        for count in range(1_000_000):
            try:
                got = run()["y"]
            except BackendError as error:
                refusals.append(str(error))
                return count
            if not np.allclose(got, expected, atol=1e-5):
                wrong.append(got)
        raise AssertionError("never closed")

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call_until_closed, seed) for seed in range(4)]
        begun.wait(timeout=30)
        threading.Event().wait(0.02)
        session.close()
        counts = [call.result(timeout=30) for call in calls]

    assert wrong == []
    assert all("closed" in refusal for refusal in refusals)
    assert sum(counts) > 0


def test_closing_one_session_leaves_another_of_the_same_graph(
    session: Session, tmp_path: Path
) -> None:
    model = save_embedder(tmp_path / "other" / "model.onnx")
    with open_session(model, options=SessionOptions(threads=1)) as other:
        session.close()
        _assert_outputs(other.run(feed_of(2)), feed_of(2))


def test_placement_names_backend_and_device(session: Session) -> None:
    placement = session.placement

    assert backend(placement.backend).name == placement.backend
    assert placement.device in backend(placement.backend).available_devices()
    assert placement.engine
    if placement.device == "cpu":
        assert placement.exceptions == {}


# What every backend does with files, whatever engine is behind it.


ON_GPUS = {"tensorrt", "tensorrt-rtx"}
NAMES = (*BACKENDS, "fake")
DEVICES = {name: "cuda" if name in ON_GPUS else "cpu" for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in ON_GPUS:
        request.getfixturevalue("fake_gpu")
    return str(request.param)


def _open(model: Path, name: str) -> Session:
    options = SessionOptions(device=DEVICES[name], axes=AXES)
    return open_session(model, backend_name=name, options=options)


def test_a_backend_opens_the_graph_with_its_specs(name: str, tmp_path: Path) -> None:
    with _open(save_embedder(tmp_path / "m.onnx"), name) as opened:
        assert opened.inputs == INPUTS
        assert opened.outputs == OUTPUTS
        assert opened.placement.backend == name
        assert opened.run(feed_of(3))["y"].shape == (3, DIM)


def test_a_backend_reads_external_data_from_beside_and_below(name: str, tmp_path: Path) -> None:
    for location in ("beside.bin", "below/weights.bin"):
        (tmp_path / "below").mkdir(exist_ok=True)
        model = save_embedder(tmp_path / f"{Path(location).stem}.onnx", external=location)
        assert (tmp_path / location).stat().st_size >= WEIGHT.nbytes
        with _open(model, name) as opened:
            assert opened.outputs == OUTPUTS


def test_a_backend_knows_its_devices_and_refuses_other_planets(name: str, tmp_path: Path) -> None:
    assert DEVICES[name] in backend(name).available_devices()
    assert bool(backend(name).layouts("cpu")) == ("cpu" in backend(name).available_devices())

    with pytest.raises(MmedgeError, match=rf"'mars'.*'{DEVICES[name]}'"):
        open_session(
            save_embedder(tmp_path / "m.onnx"),
            backend_name=name,
            options=SessionOptions(device="mars"),
        )


def _damage(kind: str, folder: Path) -> Path:
    """Write a model that cannot be opened, and return its path."""
    model = folder / "models" / "m.onnx"
    if kind in ("missing", "folder"):
        (folder / "models").mkdir()
        if kind == "folder":
            model.mkdir()
        return model
    save_embedder(model, external="m.data" if "data" in kind else None)
    data = model.with_name("m.data")
    content = model.read_bytes()
    if kind == "empty":
        model.write_bytes(b"")
    elif kind == "junk":
        model.write_bytes(b"\x89PNG\r\n\x1a\n" * 64)
    elif kind == "cut":
        model.write_bytes(content[: len(content) // 2])
    elif kind == "data missing":
        data.unlink()
    elif kind == "data cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif kind == "data outside":
        data.rename(folder / "m.data")
        model.write_bytes(content.replace(b"\x12\x06m.data", b"\x12\x06../m.d"))
        (folder / "m.data").rename(folder / "m.d")
    elif kind == "data absolute":
        model.write_bytes(content.replace(b"\x12\x06m.data", b"\x12\x06/m.dat"))
    elif kind == "data linked out":
        data.rename(folder / "m.data")
        data.symlink_to(folder / "m.data")
    elif kind == "data loop":
        data.unlink()
        data.symlink_to(data)
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such model file"),
        ("folder", "no such model file"),
        ("empty", "not a readable ONNX model"),
        ("junk", "not a readable ONNX model"),
        ("cut", "not a readable ONNX model"),
        ("data missing", "'m.data' is missing from"),
        ("data cut", "'m.data' is cut short: got"),
        ("data outside", "'../m.d' leads outside"),
        ("data absolute", "'/m.dat' leads outside"),
        ("data linked out", "'m.data' leads outside"),
        ("data loop", "'m.data' cannot be reached|'m.data' is missing"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(
    name: str, kind: str, message: str, tmp_path: Path
) -> None:
    model = _damage(kind, tmp_path)

    with pytest.raises(BackendError, match=message) as caught:
        _open(model, name)
    assert str(model) in str(caught.value)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"'tea'.*onnxruntime"):
        open_session(tmp_path / "m.onnx", backend_name="tea")
