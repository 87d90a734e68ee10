"""A writer to be killed: changes an index at random and reports what it was told is durable.

Run as `python killing.py INDEX SEED BUNDLES`; the index is of one of two bundles
of different spaces, and migrates between them. On stdout, a line of JSON before each change
and one when the call has returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.retrieval import migrating, upkeep
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.retrieval.record import Durability
from mmedge.specs import Float32Array

DIM = 4  # of the tiny bundles
_NAMES = 60


SPACE = ""  # in a state, the number of the index's bundle; every other name is an item's


def vector_of(name: str, value: int, space: int) -> Float32Array:
    """The vector of an item whose metadata holds this value, in the space of a bundle."""
    seed = [*name.encode(), value, space]
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def apply(
    index: Index,
    change: dict[str, Any],
    space: int,
    bundles: list[str],
    durability: Durability = "full",
) -> None:
    """Make one change of an index; `state` below is its meaning."""
    ids, value = change["ids"], change["value"]
    if change["call"] == "delete":
        index.delete(ids, durability=durability)
    elif change["call"] == "compact":
        index.compact()
    elif change["call"] == "migrate":

        def embed(_: object, item: Item) -> Float32Array:
            return vector_of(item.id, int(str(item.metadata["value"])), 1 - space)

        index.migrate(bundles[1 - space], embed=embed)
    else:
        call = index.add if change["call"] == "add" else index.update
        call(
            ids=ids,
            vectors=np.stack([vector_of(name, value, space) for name in ids]),
            metadata=[{"value": value}] * len(ids),
            texts=[f"value {value}"] * len(ids),
            durability=durability,
        )


def state(before: dict[str, int], change: dict[str, Any]) -> dict[str, int]:
    """What an index holds after a change."""
    ids, value = change["ids"], change["value"]
    if change["call"] == "migrate":
        return before | {SPACE: 1 - before[SPACE]}
    if change["call"] == "delete":
        return {name: held for name, held in before.items() if name not in ids}
    return before | dict.fromkeys(ids, value)


def random_change(rng: np.random.Generator, held: dict[str, int], value: int) -> dict[str, Any]:
    calls = ["add", "update", "delete", "compact", "migrate"]
    call = str(rng.choice(calls, p=[0.4, 0.2, 0.2, 0.1, 0.1]))
    names = [f"n{number}" for number in range(_NAMES)]
    usable = [name for name in names if (name in held) is (call != "add")]
    if call in ("compact", "migrate"):
        return {"call": call, "ids": [], "value": value}
    count = min(len(usable), int(rng.integers(1, 9)))
    chosen = rng.choice(usable, count, replace=False).tolist() if count else []
    return {"call": call if chosen else "compact", "ids": chosen, "value": value}


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(path: str, seed: str, *bundles: str) -> None:
    upkeep._TAIL_ROWS, upkeep._MERGED_ROWS, migrating._ITEMS_AT_ONCE = 12, 48, 8
    rng = np.random.default_rng(int(seed))
    with Index.open(Path(path)) as index:
        held = {item.id: int(str(item.metadata["value"])) for item in index.items(vectors=False)}
        held[SPACE] = int(index.space == "tiny-0002")
        value = max(held.values(), default=0)
        say({"begin": held})
        while True:
            value += 1
            change = random_change(rng, held, value)
            say(change)
            apply(index, change, held[SPACE], list(bundles))
            say({"done": value})
            held = state(held, change)


if __name__ == "__main__":
    main(*sys.argv[1:])
