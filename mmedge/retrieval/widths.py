"""How much of its lists a search looks at, for a recall."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mmedge.errors import IndexCorruptedError

__all__ = ["Width", "Widths"]

_TEXT_CHARACTERS = 1 << 20
_LARGEST = 1 << 32


@dataclass(frozen=True, slots=True, order=True)
class Width:
    """How much of a segment a search looks at.

    Attributes:
        lists: Scanned.
        candidates: The best of these by their codes, which are compared by their vectors.
    """

    lists: int
    candidates: int

    def __post_init__(self) -> None:
        if not (1 <= self.lists <= _LARGEST and 1 <= self.candidates <= _LARGEST):
            raise ValueError(f"{self.lists} lists, {self.candidates} candidates")


@dataclass(frozen=True, slots=True)
class Widths:
    """Which width reaches which recall, by kind of query and number of matches.

    Attributes:
        curves: By kind of query ("text", "image", ...), by k: (width, recall) pairs, the quickest
            first; the recall is a lower bound of what other queries reach on average, at a
            confidence of 95 %.
        queries: How many queries of each kind were measured.
    """

    curves: Mapping[str, Mapping[int, tuple[tuple[Width, float], ...]]]
    queries: Mapping[str, int]

    def width(self, kind: str | None, recall: float, k: int) -> Width | None:
        """Return the quickest width that reaches a recall; None if only an exact search does.

        Args:
            kind: Of the query; None for a vector of unknown kind, which gets the most that any kind
                needs.
            recall: Share of the true k nearest to find on average.
            k: Matches.
        """
        kinds = list(self.curves) if kind is None else [kind]
        needed: list[Width] = []
        for name in kinds:
            curves = self.curves.get(name, {})
            measured = min((size for size in curves if size >= k), default=None)
            if measured is None:
                return None
            enough = (width for width, reached in curves[measured] if reached >= recall)
            quickest = next(enough, None)
            if quickest is None:
                return None
            needed.append(quickest)
        if not needed:
            return None
        return Width(max(each.lists for each in needed), max(each.candidates for each in needed))

    def to_json(self) -> str:
        """Return a text for `from_json`."""
        curves = {
            kind: {
                k: [(width.lists, width.candidates, reached) for width, reached in curve]
                for k, curve in by_k.items()
            }
            for kind, by_k in self.curves.items()
        }
        return json.dumps({"curves": curves, "queries": self.queries})

    @classmethod
    def from_json(cls, text: str) -> Widths:
        """Read what `to_json` wrote.

        Raises:
            IndexCorruptedError: If it is something else.
        """
        try:
            if len(text) > _TEXT_CHARACTERS:
                raise ValueError(f"{len(text)} characters")  # noqa: TRY301
            read = json.loads(text)
            curves = {
                str(kind): {
                    int(k): tuple(
                        (Width(int(lists), int(candidates)), float(reached))
                        for lists, candidates, reached in curve
                    )
                    for k, curve in by_k.items()
                }
                for kind, by_k in read["curves"].items()
            }
            queries = {str(kind): int(count) for kind, count in read["queries"].items()}
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise IndexCorruptedError(
                f"The search widths of a snapshot are damaged ({error}). Run 'mmedge index "
                "compact', which measures them again."
            ) from error
        return cls(curves, queries)
