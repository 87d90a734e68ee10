"""Where state lies in ONNX Runtime: handed on as it is, and never sent through the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from tiny_graphs import save
from toy_states import APPENDED, IN_PLACE, TOYS, WIDTH, Toy

from mmedge.errors import BackendError
from mmedge.runtimes import Placement, SessionOptions, StatefulRun, open_session
from mmedge.runtimes.ort import state as ort_state
from mmedge.runtimes.ort.session import OrtSession
from mmedge.runtimes.ort.state import OrtState
from mmedge.runtimes.state import HostState
from mmedge.specs import Array, State, StateTensor


def sequences(length: int, batch: int = 2) -> Array:
    random = np.random.default_rng(length)
    return random.standard_normal((batch, length, WIDTH)).astype(np.float32)


def step(run: StatefulRun, toy: Toy, x: Array) -> Array:
    capacity = toy.state.capacity or 0
    return run.step({"x": x, **toy.beside(run.length, x.shape[1], len(x), capacity)})["y"]


def opened(toy: Toy, folder: Path) -> tuple[OrtSession, HostState]:
    session = open_session(toy.save(folder / "m.onnx"), options=SessionOptions(threads=1))
    assert isinstance(session, OrtSession)
    run = session.start(toy.state, batch=2, given=toy.constants(2))
    assert isinstance(run, OrtState if toy is IN_PLACE else HostState)
    return session, run


@pytest.mark.parametrize("name", ["appended", "replaced", "appended_and_constant"])
def test_on_the_cpu_outputs_are_handed_on_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = TOYS[name]
    session, run = opened(toy, tmp_path)
    fed: list[dict[str, Array]] = []
    made: list[dict[str, Array]] = []
    kept = session._run

    def spy(engine: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
        fed.append(dict(feed))
        made.append(kept(engine, feed))
        return made[-1]

    monkeypatch.setattr(session, "_run", spy)
    with session, run:
        for _ in range(3):
            step(run, toy, sequences(1))

    for tensor in toy.state.tensors:
        later = [feed[tensor.input] for feed in fed[1:]]
        before = [fed[0][tensor.input] if tensor.output is None else m[tensor.output] for m in made]
        assert all(one is other for one, other in zip(later, before, strict=False))


def test_a_buffer_is_written_where_it_lies(tmp_path: Path) -> None:
    session, run = opened(IN_PLACE, tmp_path)
    x = sequences(5)
    with session, run:
        assert run._held is not None
        buffer = run._held["buffer"]
        step(run, IN_PLACE, x[:, :4])
        step(run, IN_PLACE, x[:, 4:])
        assert run._held["buffer"] is buffer
        np.testing.assert_allclose(buffer.numpy()[:, :5], run.save()["buffer"], rtol=0, atol=0)
        assert np.abs(buffer.numpy()[:, 4]).max() > 0


def test_a_failing_step_is_reported_and_leaves_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, run = opened(IN_PLACE, tmp_path)
    x = sequences(4)
    first = step(run, IN_PLACE, x[:, :3])
    native = session._engine

    def fail(_: object) -> None:
        raise RuntimeError("the GPU fell off the bus")

    session._engine = SimpleNamespace(io_binding=native.io_binding, run_with_iobinding=fail)
    with pytest.raises(BackendError, match=r"m\.onnx: the run failed.*fell off"):
        step(run, IN_PLACE, x[:, 3:])
    session._engine = native

    assert run.length == 3
    got = np.concatenate([first, step(run, IN_PLACE, x[:, 3:])], axis=1)
    expected = IN_PLACE.whole(x, {})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    session.close()


def test_on_a_gpu_state_is_made_there_and_outputs_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []
    values = [SimpleNamespace(shape=lambda: [1, 1, WIDTH]) for _ in range(3)]
    binding = SimpleNamespace(
        bind_cpu_input=lambda *how: asked.append(("fed", *how)),
        bind_ortvalue_input=lambda name, value: asked.append(("held", name, value)),
        bind_output=lambda *how: asked.append(("made", *how[:3])),
        get_outputs=lambda: values,
    )
    specs = {
        kind: [SimpleNamespace(name=s.name, type="tensor(float)", shape=list(s.shape)) for s in of]
        for kind, of in (("in", APPENDED.inputs), ("out", APPENDED.outputs))
    }
    native = SimpleNamespace(
        get_inputs=lambda: specs["in"],
        get_outputs=lambda: specs["out"],
        io_binding=lambda: binding,
        run_with_iobinding=lambda _: None,
    )

    def hold(array: Array, kind: str, index: int) -> Any:
        return SimpleNamespace(shape=lambda: array.shape, where=(kind, index))

    engine = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_numpy=hold))
    monkeypatch.setattr(ort_state, "load_engine", lambda: engine)
    placement = Placement("onnxruntime", "cuda:1", "onnxruntime")
    run = OrtSession(native, Path("m.onnx"), placement).start(APPENDED.state)
    run.step({"x": sequences(1, 1), **APPENDED.beside(0, 1, 1, 0)})

    held = {how[0]: how[1] for kind, *how in asked if kind == "held"}
    assert {name: value.where for name, value in held.items()} == {
        "past.0.key": ("cuda", 1),
        "past.0.value": ("cuda", 1),
    }
    made = {how[0]: tuple(how[1:]) for kind, *how in asked if kind == "made"}
    assert made == {
        "y": ("cpu", 0),
        "present.0.key": ("cuda", 1),
        "present.0.value": ("cuda", 1),
    }


def test_fused_attention_writes_one_buffer(tmp_path: Path) -> None:
    heads, size, slots, length = 2, 8, 16, 7
    names = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total")
    buffer = ["batch", 1, "slots", size]
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "query": (TensorProto.FLOAT, ["batch", "sequence", heads * size]),
        **dict.fromkeys(("key", "value"), (TensorProto.FLOAT, ["batch", "sequence", size])),
        **dict.fromkeys(("past_key", "past_value"), (TensorProto.FLOAT, buffer)),
        "seqlens_k": (TensorProto.INT32, ["batch"]),
        "total": (TensorProto.INT32, []),
        "y": (TensorProto.FLOAT, ["batch", "sequence", heads * size]),
        **dict.fromkeys(("present_key", "present_value"), (TensorProto.FLOAT, buffer)),
    }
    infos = {name: helper.make_tensor_value_info(name, *how) for name, how in shapes.items()}
    outputs = ["y", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention",
        list(names),
        outputs,
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=1,
    )
    model = save(
        tmp_path / "m.onnx", [node], [infos[n] for n in names], [infos[n] for n in outputs]
    )
    state = State(
        tuple(
            StateTensor(f"past_{what}", f"present_{what}", "in_place", 2)
            for what in ("key", "value")
        ),
        capacity=slots,
    )
    random = np.random.default_rng(0)
    query, key, value = (
        random.standard_normal((1, length, n * size)).astype(np.float32) for n in (heads, 1, 1)
    )
    with open_session(model, options=SessionOptions(threads=1)) as session:
        run = session.start(state)
        got = []
        for begin, end in ((0, 4), (4, 5), (5, 7)):
            new = slice(begin, end)
            feed = {"query": query[:, new], "key": key[:, new], "value": value[:, new]}
            feed["seqlens_k"] = np.array([end - 1], np.int32)
            feed["total"] = np.array(end, np.int32)
            got.append(run.step(feed)["y"])

    rows = query.reshape(1, length, heads, size).transpose(0, 2, 1, 3)
    scores = rows @ key[:, None].transpose(0, 1, 3, 2) / np.sqrt(size)
    scores = np.where(np.tri(length), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    seen = (shares / shares.sum(axis=-1, keepdims=True)) @ value[:, None]
    expected = seen.transpose(0, 2, 1, 3).reshape(1, length, -1)
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, rtol=1e-4, atol=1e-5)
