"""A writer to be killed: changes an index at random and reports what it was told is durable.

Run as `python -m tests.retrieval.killing INDEX SEED`. On stdout, a line of JSON before each change
and one when the call has returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index
from mmedge.specs import Float32Array
from tests.retrieval.indexes import DIM

_NAMES = 60


def vector_of(name: str, value: int) -> Float32Array:
    """The vector of an item whose metadata holds this value."""
    seed = [int(part) for part in name.encode()] + [value]
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def apply(index: Index, change: dict[str, Any]) -> None:
    """Make one change of an index; `state` below is its meaning."""
    ids, value = change["ids"], change["value"]
    if change["call"] == "delete":
        index.delete(ids)
    elif change["call"] == "compact":
        index.compact()
    else:
        call = index.add if change["call"] == "add" else index.update
        call(
            ids=ids,
            vectors=np.stack([vector_of(name, value) for name in ids]),
            metadata=[{"value": value}] * len(ids),
            texts=[f"value {value}"] * len(ids),
        )


def state(before: dict[str, int], change: dict[str, Any]) -> dict[str, int]:
    """What an index holds after a change."""
    ids, value = change["ids"], change["value"]
    if change["call"] == "delete":
        return {name: held for name, held in before.items() if name not in ids}
    return before | dict.fromkeys(ids, value)


def random_change(rng: np.random.Generator, held: dict[str, int], value: int) -> dict[str, Any]:
    call = str(rng.choice(["add", "update", "delete", "compact"], p=[0.5, 0.2, 0.25, 0.05]))
    names = [f"n{number}" for number in range(_NAMES)]
    usable = [name for name in names if (name in held) is (call != "add")]
    count = 0 if call == "compact" else min(len(usable), int(rng.integers(1, 9)))
    chosen = rng.choice(usable, count, replace=False).tolist() if count else []
    return {"call": call if chosen else "compact", "ids": chosen, "value": value}


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(path: str, seed: str) -> None:
    upkeep._TAIL_ROWS, upkeep._MERGED_ROWS = 12, 48
    rng = np.random.default_rng(int(seed))
    with Index.open(Path(path)) as index:
        held = {item.id: int(str(item.metadata["value"])) for item in index.items(vectors=False)}
        value = max(held.values(), default=0)
        say({"begin": held})
        while True:
            value += 1
            change = random_change(rng, held, value)
            say(change)
            apply(index, change)
            say({"done": value})
            held = state(held, change)


if __name__ == "__main__":
    main(*sys.argv[1:])
