"""Queries for a gallery of scenes, each with the exact set of relevant images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from world import Scene, Thing, relation

__all__ = ["Query", "queries_about"]

_COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Query:
    """A text to search with.

    Attributes:
        text: Query text.
        kind: Kind of query ("attribute", "count", ...).
        relevant: Indices of all matching images of the gallery; never empty.
    """

    text: str
    kind: str
    relevant: frozenset[int]


def queries_about(gallery: Sequence[tuple[Scene, str]]) -> list[Query]:
    """Return six kinds of query for a gallery, each with a match.

    Args:
        gallery: Scenes with their captions.

    Raises:
        ValueError: If the gallery is too small to ask every kind of question.
    """
    scenes = [scene for scene, _ in gallery]
    pairs = [scene for scene in scenes if len({thing.label for thing in scene.things}) == 2]
    pairs = [scene for scene in pairs if len(scene.things) == 2]
    trios = [scene for scene in scenes if len({thing.kind for thing in scene.things}) == 3]
    groups = [scene for scene in scenes if len({thing.kind for thing in scene.things}) == 1]
    groups = [scene for scene in groups if len(scene.things) > 1]
    beside = [scene for scene in pairs if relation(*scene.things) in {"left of", "right of"}]
    if not (beside and trios and groups):
        raise ValueError(f"a gallery of {len(gallery)} images is too small: make it larger")

    def query(text: str, kind: str, true_of: Callable[[Scene], bool]) -> Query:
        relevant = frozenset(i for i, scene in enumerate(scenes) if true_of(scene))
        return Query(text, kind, relevant)

    label = Counter(t.label for scene in scenes for t in scene.things).most_common(1)[0][0]
    placed = trios[0].things[0]
    row, column = placed.zone
    left, right = sorted(beside[0].things, key=lambda thing: thing.x)
    first, second = pairs[-1].things
    group = groups[0].things
    whole = scenes.index(trios[-1])
    return [
        query(_a(label), "attribute", lambda scene: _count(scene, label) > 0),
        query(
            f"{_a(placed.size, placed.label)} {_place(row, column)}",
            "attribute and place",
            lambda scene: any((t.kind, t.zone) == (placed.kind, placed.zone) for t in scene.things),
        ),
        query(
            f"{_a(left.label)} to the left of {_a(right.label)}",
            "relation",
            lambda scene: _left_of(scene, left.label, right.label),
        ),
        query(
            f"{_a(first.label)} and {_a(second.label)}",
            "two things",
            lambda scene: _count(scene, first.label) > 0 and _count(scene, second.label) > 0,
        ),
        query(
            f"{_COUNTS[len(group)]} {group[0].size} {_plural(group[0])}",
            "count",
            lambda scene: sum(t.kind == group[0].kind for t in scene.things) == len(group),
        ),
        Query(gallery[whole][1], "whole scene", frozenset([whole])),
    ]


def _count(scene: Scene, label: str) -> int:
    return sum(thing.label == label for thing in scene.things)


def _left_of(scene: Scene, first: str, second: str) -> bool:
    return any(
        (a.label, b.label, relation(a, b)) == (first, second, "left of")
        for a, b in permutations(scene.things, 2)
    )


def _a(*words: str) -> str:
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _plural(thing: Thing) -> str:
    return thing.label + ("es" if thing.shape == "cross" else "s")


def _place(row: str, column: str) -> str:
    if (row, column) == ("middle", "centre"):
        return "in the centre"
    if row == "middle":
        return f"on the {column}"
    return f"at the {row}" if column == "centre" else f"at the {row} {column}"
