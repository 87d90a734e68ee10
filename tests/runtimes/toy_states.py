"""Four tiny graphs with state, one of each kind, each written down a second time in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import helper
from tiny_graphs import INPUTS, OUTPUTS, embed, save, save_embedder

from mmedge.specs import Array, Axis, State, StateTensor, TensorSpec

WIDTH, HIDDEN, CAPACITY = 4, 3, 12
AXES = {
    "batch": Axis(1, 2, 8),
    "sequence": Axis(1, 1, 8),
    "past": Axis(0, 4, CAPACITY),
    "slots": Axis(1, 8, CAPACITY),
    "frames": Axis(1, 5, 6),
}
FLOAT = np.dtype(np.float32)
_RANDOM = np.random.default_rng(3)


def _weight(*shape: int) -> Array:
    return _RANDOM.standard_normal(shape).astype(np.float32) / 2


QUERY, KEY, VALUE = _weight(WIDTH, WIDTH), _weight(WIDTH, WIDTH), _weight(WIDTH, WIDTH)
GATES, AGAIN = _weight(1, 3 * HIDDEN, WIDTH), _weight(1, 3 * HIDDEN, HIDDEN)


@dataclass(frozen=True)
class Toy:
    """A graph, and what it computes.

    Attributes:
        inputs: Input specs.
        outputs: Output specs.
        save: Writes the graph to a path; `external` is the location of its weights.
        compute: The graph in numpy.
        state: Its state; without tensors where it has none.
        beside: Inputs beside x, from the positions held and new, and the capacity.
        constants: What is made once a sequence, from the batch.
        whole: y of whole sequences, from x (batch, n, WIDTH) and the constants.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    save: Callable[..., Path]
    compute: Callable[[Mapping[str, Array]], dict[str, Array]]
    state: State = field(default_factory=lambda: State(()))
    beside: Callable[[int, int, int, int], dict[str, Array]] = lambda *_: {}
    constants: Callable[[int], dict[str, Array]] = lambda _: {}
    whole: Callable[[Array, Mapping[str, Array]], Array] = lambda x, _: x


def _saver(
    nodes: list[tuple[str, str, str, dict[str, object]]],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    weights: Mapping[str, Array],
) -> Callable[..., Path]:
    def write(path: Path, *, external: str | None = None) -> Path:
        made = [
            helper.make_node(op, a.replace("-", "").split(" "), b.split(" "), **how)
            for op, a, b, how in nodes
        ]
        infos = [
            [
                helper.make_tensor_value_info(
                    spec.name, helper.np_dtype_to_tensor_dtype(spec.dtype), spec.shape
                )
                for spec in specs
            ]
            for specs in (inputs, outputs)
        ]
        return save(path, made, *infos, weights, external=external)

    return write


def _softmax(scores: Array) -> Array:
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def _attend(x: Array, keys: Array, values: Array, mask: Array) -> Array:
    return _softmax((x @ QUERY) @ keys.transpose(0, 2, 1) + mask) @ values


def _causal(held: int, new: int) -> Array:
    """Return 0 where a new position may look and -1e4 elsewhere, (new, held + new)."""
    may = np.arange(held + new)[None, :] <= np.arange(held, held + new)[:, None]
    return np.where(may, 0, -1e4).astype(np.float32)


def _causal_mask(held: int, new: int, batch: int, _: int) -> dict[str, Array]:
    return {"mask": np.broadcast_to(_causal(held, new), (batch, new, held + new))}


# Appended: keys and values of a causal attention.

X = TensorSpec("x", FLOAT, ("batch", "sequence", WIDTH))
Y = TensorSpec("y", FLOAT, ("batch", "sequence", WIDTH))
MASK = TensorSpec("mask", FLOAT, ("batch", "sequence", "past + sequence"))
PAST = tuple(
    TensorSpec(f"past.0.{what}", FLOAT, ("batch", "past", WIDTH)) for what in ("key", "value")
)
PRESENT = tuple(
    TensorSpec(f"present.0.{what}", FLOAT, ("batch", "past + sequence", WIDTH))
    for what in ("key", "value")
)
_APPENDED = tuple(
    StateTensor(past.name, present.name, "append", axis=1)
    for past, present in zip(PAST, PRESENT, strict=True)
)
_SELF: list[tuple[str, str, str, dict[str, object]]] = [
    ("MatMul", "x Q", "query", {}),
    ("MatMul", "x K", "key", {}),
    ("MatMul", "x V", "value", {}),
    ("Concat", "past.0.key key", "present.0.key", {"axis": 1}),
    ("Concat", "past.0.value value", "present.0.value", {"axis": 1}),
    ("Transpose", "present.0.key", "keys", {"perm": [0, 2, 1]}),
    ("MatMul", "query keys", "raw", {}),
    ("Add", "raw mask", "scores", {}),
    ("Softmax", "scores", "shares", {"axis": -1}),
]


def _append(feed: Mapping[str, Array]) -> dict[str, Array]:
    keys, values = (
        np.concatenate([feed[past.name], feed["x"] @ weight], axis=1)
        for past, weight in zip(PAST, (KEY, VALUE), strict=True)
    )
    y = _attend(feed["x"], keys, values, feed["mask"])
    return {"y": y, "present.0.key": keys, "present.0.value": values}


APPENDED = Toy(
    inputs=(X, MASK, *PAST),
    outputs=(Y, *PRESENT),
    save=_saver(
        [*_SELF, ("MatMul", "shares present.0.value", "y", {})],
        (X, MASK, *PAST),
        (Y, *PRESENT),
        {"Q": QUERY, "K": KEY, "V": VALUE},
    ),
    compute=_append,
    state=State(_APPENDED, length="past", capacity=CAPACITY),
    beside=_causal_mask,
    whole=lambda x, _: _attend(x, x @ KEY, x @ VALUE, _causal(0, x.shape[1])),
)


# In place: a buffer that is written at the positions that are fed, and read by a mask.

_BUFFER = TensorSpec("buffer", FLOAT, ("batch", "slots", WIDTH))
_WRITTEN = TensorSpec("written", FLOAT, ("batch", "slots", WIDTH))
_PLACES = TensorSpec("places", np.dtype(np.int64), ("batch", "sequence", 1))
_SHARES = TensorSpec("shares", FLOAT, ("batch", "sequence", "slots"))


def _write(feed: Mapping[str, Array]) -> dict[str, Array]:
    written = feed["buffer"].copy()
    np.put_along_axis(written, feed["places"], feed["x"] @ VALUE, axis=1)
    return {"y": feed["shares"] @ written, "written": written}


def _places(held: int, new: int, batch: int, capacity: int) -> dict[str, Array]:
    """Return where the new positions go, and the mean of all positions so far."""
    at = np.arange(held, held + new)
    shares = (np.arange(capacity)[None, :] <= at[:, None]) / (at[:, None] + 1)
    return {
        "places": np.broadcast_to(at[:, None], (batch, new, 1)).astype(np.int64),
        "shares": np.broadcast_to(shares, (batch, new, capacity)).astype(np.float32),
    }


IN_PLACE = Toy(
    inputs=(X, _PLACES, _SHARES, _BUFFER),
    outputs=(Y, _WRITTEN),
    save=_saver(
        [
            ("MatMul", "x V", "value", {}),
            ("Shape", "value", "shape", {}),
            ("Expand", "places shape", "at", {}),
            ("ScatterElements", "buffer at value", "written", {"axis": 1}),
            ("MatMul", "shares written", "y", {}),
        ],
        (X, _PLACES, _SHARES, _BUFFER),
        (Y, _WRITTEN),
        {"V": VALUE},
    ),
    compute=_write,
    state=State(
        (StateTensor("buffer", "written", "in_place", axis=1),), length="past", capacity=CAPACITY
    ),
    beside=_places,
    whole=lambda x, _: (x @ VALUE).cumsum(axis=1) / np.arange(1, x.shape[1] + 1)[:, None],
)


# Replaced: the hidden state of a GRU, whose batch is the second axis.

_HIDDEN = TensorSpec("hidden", FLOAT, (1, "batch", HIDDEN))
_AFTER = TensorSpec("after", FLOAT, (1, "batch", HIDDEN))
_ROWS = TensorSpec("y", FLOAT, ("batch", "sequence", HIDDEN))


def _recur(feed: Mapping[str, Array]) -> dict[str, Array]:
    hidden, rows = feed["hidden"][0], []
    for x in feed["x"].transpose(1, 0, 2):
        fed, again = x @ GATES[0].T, hidden @ AGAIN[0].T
        update, reset = (
            1 / (1 + np.exp(-(fed + again)[:, part * HIDDEN : (part + 1) * HIDDEN]))
            for part in (0, 1)
        )
        new = np.tanh(fed[:, 2 * HIDDEN :] + (reset * hidden) @ AGAIN[0, 2 * HIDDEN :].T)
        hidden = (1 - update) * new + update * hidden
        rows.append(hidden)
    return {"y": np.stack(rows, axis=1), "after": hidden[None]}


REPLACED = Toy(
    inputs=(X, _HIDDEN),
    outputs=(_ROWS, _AFTER),
    save=_saver(
        [
            ("Transpose", "x", "steps", {"perm": [1, 0, 2]}),
            ("GRU", "steps W R - - hidden", "all after", {"hidden_size": HIDDEN}),
            ("Squeeze", "all one", "rows", {}),
            ("Transpose", "rows", "y", {"perm": [1, 0, 2]}),
        ],
        (X, _HIDDEN),
        (_ROWS, _AFTER),
        {"W": GATES, "R": AGAIN, "one": np.array([1])},
    ),
    compute=_recur,
    state=State((StateTensor("hidden", "after", "replace"),)),
    whole=lambda x, _: _recur(
        {"x": x, "hidden": np.zeros((1, len(x), HIDDEN), np.float32)},
    )["y"],
)


# Appended and constant: a decoder that also looks at what an encoder made.

_MEMORY = TensorSpec("memory", FLOAT, ("batch", "frames", WIDTH))


def _cross(x: Array, memory: Array) -> Array:
    return _softmax((x @ QUERY) @ memory.transpose(0, 2, 1)) @ memory


def _memory(batch: int) -> dict[str, Array]:
    made = np.random.default_rng(batch).standard_normal((batch, 5, WIDTH))
    return {"memory": made.astype(np.float32)}


def _append_and_cross(feed: Mapping[str, Array]) -> dict[str, Array]:
    made = _append(feed)
    return made | {"y": made["y"] + _cross(feed["x"], feed["memory"])}


ENCODED = Toy(
    inputs=(X, MASK, *PAST, _MEMORY),
    outputs=(Y, *PRESENT),
    save=_saver(
        [
            *_SELF,
            ("MatMul", "shares present.0.value", "seen", {}),
            ("Transpose", "memory", "turned", {"perm": [0, 2, 1]}),
            ("MatMul", "query turned", "far", {}),
            ("Softmax", "far", "looks", {"axis": -1}),
            ("MatMul", "looks memory", "found", {}),
            ("Add", "seen found", "y", {}),
        ],
        (X, MASK, *PAST, _MEMORY),
        (Y, *PRESENT),
        {"Q": QUERY, "K": KEY, "V": VALUE},
    ),
    compute=_append_and_cross,
    state=State(
        (*_APPENDED, StateTensor("memory", None, "constant", source=("encoder", "hidden"))),
        length="past",
        capacity=CAPACITY,
    ),
    beside=_causal_mask,
    constants=_memory,
    whole=lambda x, given: (
        _attend(x, x @ KEY, x @ VALUE, _causal(0, x.shape[1])) + _cross(x, given["memory"])
    ),
)

TOYS = {
    "appended": APPENDED,
    "in_place": IN_PLACE,
    "replaced": REPLACED,
    "appended_and_constant": ENCODED,
}
EMBEDDER = Toy(INPUTS, OUTPUTS, save_embedder, embed)
