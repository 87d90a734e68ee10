"""Readers beside a writer: a plan of changes, and whether what a reader gets is a state of it.

Run as `python beside.py INDEX SEED ANSWERS STATES`: a reader, which ends when it has checked so
many answers and seen so many states.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from killing import DIM, apply, random_change, state, vector_of

from mmedge.retrieval import Query, Range
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Match

State = dict[str, int]
"""By item the value that its vector, its metadata and its text hold."""
Question = tuple[Callable[[Index], object], Callable[[State], object]]
"""What is asked of an index, and the answer to it in a state."""

_NAMES = [f"n{number}" for number in range(60)]
_QUERY = np.linspace(-0.5, 1, DIM, dtype=np.float32)
_ALL = 100  # matches, more than there are items


class Plan:
    """Changes of an index, without end, and the states between them; the same for a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._changes: list[dict[str, Any]] = []
        self._states: list[State] = [{}]

    def change(self, number: int) -> dict[str, Any]:
        """The change that leads from state `number` to the next."""
        self.state(number + 1)
        return self._changes[number]

    def state(self, number: int) -> State:
        while len(self._states) <= number:
            held, value = self._states[-1], len(self._states)
            change = random_change(self._rng, held, value)
            if change["call"] == "migrate" or not state(held, change):
                change = {"call": "compact", "ids": [], "value": value}
            if not held:
                change = {"call": "add", "ids": _NAMES[:8], "value": value}
            self._changes.append(change)
            self._states.append(state(held, change))
        return self._states[number]


class Progress:
    """How many changes have begun and how many have returned: the sizes of two growing files."""

    def __init__(self, index: Path) -> None:
        self._begun, self._done = index.with_suffix(".begun"), index.with_suffix(".done")
        for path in (self._begun, self._done):
            path.touch()

    def write(self, index: Index, plan: Plan) -> None:
        """Make the next change of a plan."""
        number = self.done()
        with self._begun.open("ab") as file:
            file.write(b".")
        apply(index, plan.change(number), 0, [], "batch" if number % 5 else "full")
        with self._done.open("ab") as file:
            file.write(b".")

    def begun(self) -> int:
        return self._begun.stat().st_size

    def done(self) -> int:
        return self._done.stat().st_size


class Reader:
    """Checks that each answer is that of one state, which is none before that of the last answer.

    It must not be older than the last change that had returned when the call began, nor newer than
    the last that had begun when the call returned.
    """

    def __init__(self, progress: Progress, seed: int) -> None:
        self._progress, self._plan, self._last = progress, Plan(seed), progress.done()
        self.answers = 0
        self.states: set[int] = set()

    def check(self, index: Index) -> None:
        """Ask the next of some questions in turn."""
        question = _QUESTIONS[self.answers % len(_QUESTIONS)]
        ask, expected = question(self._plan.state(self._last))
        oldest = max(self._progress.done(), self._last)
        answer = ask(index)
        newest = self._progress.begun()
        self._last = next(
            (
                number
                for number in range(oldest, newest + 1)
                if expected(self._plan.state(number)) == answer
            ),
            -1,
        )
        assert self._last >= 0, f"{question.__name__}: {answer} in no state {oldest} to {newest}"
        self.states.add(self._last)
        self.answers += 1


def _everything(_: State) -> Question:
    return lambda index: _values(index.search(_QUERY, _ALL, recall=1)), lambda held: held


def _newer_half(seen: State) -> Question:
    """Items by a filter, the same one until others are the newer half."""
    low = sorted(seen.values())[len(seen) // 2]
    return (
        lambda index: _values(index.search(_QUERY, _ALL, where=Range("value", low=low), recall=1)),
        lambda held: {name: value for name, value in held.items() if value >= low},
    )


def _one_text(seen: State) -> Question:
    """All items, and those of them whose text has a word."""
    word = max(seen.values())

    def ask(index: Index) -> tuple[State, set[str]]:
        matches = index.search(Query(_QUERY, words=str(word)), _ALL, recall=1)
        # Only what both rankings hold, of items and of words, has more than the first of one.
        return _values(matches, scores=False), {each.id for each in matches if each.score > 1 / 61}

    return ask, lambda held: (held, {name for name, value in held.items() if value == word})


def _by_id(_: State) -> Question:
    def ask(index: Index) -> State:
        items = [item for item in index.get(_NAMES) if item is not None]
        found = {item.id: int(str(item.metadata["value"])) for item in items}
        for item in items:
            assert item.text == f"value {found[item.id]}"
            true = _unit(item.id, found[item.id])
            np.testing.assert_allclose(item.vectors, [true], atol=1e-3)
        return found

    return ask, lambda held: held


_QUESTIONS = (_everything, _newer_half, _one_text, _by_id)


def _unit(name: str, value: int) -> np.ndarray:
    vector = vector_of(name, value, 0)
    return vector / np.linalg.norm(vector)


def _values(matches: Iterable[Match], *, scores: bool = True) -> State:
    """The values that matches hold; metadata, text and score of each must be of one value."""
    found: State = {}
    for match in matches:
        value = int(str(match.metadata["value"]))
        assert match.id not in found
        assert match.text == f"value {value}"
        if scores:
            true = _unit(match.id, value) @ _QUERY / np.linalg.norm(_QUERY)
            assert abs(match.score - true) < 2e-3, (match, true)
        found[match.id] = value
    return found


def main(path: str, seed: str, answers: str, states: str) -> None:
    reader = Reader(Progress(Path(path)), int(seed))
    while reader.answers < int(answers) or len(reader.states) < int(states):
        with Index.open(Path(path), read_only=True) as index:  # opened again and again
            for _ in range(5 * len(_QUESTIONS)):
                reader.check(index)
    sys.stdout.write(json.dumps({"answers": reader.answers, "states": len(reader.states)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
