"""A query of several parts: things that items are to be like and not to be like, and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from mmedge.errors import InputError

if TYPE_CHECKING:
    from mmedge.preprocess.decode import ImageSource
    from mmedge.specs import Float32Array

    Part: TypeAlias = str | ImageSource | Float32Array

__all__ = ["Query"]


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One query of several parts.

    `Query([photo, "at night"], unlike="people", words="garage")` looks for items that are like the
    photo and like the text, not like people, and moves up those whose text has the word. Of the
    parts a str is a text, a floating-point array (D,) is a vector, and all else is an image.

    Attributes:
        like: What items are to be like: one part or several.
        unlike: What they are not to be like: one part or several.
        weights: Of the parts of `like`; None for equal ones. Only their ratios count.
        without: Weight of all `unlike` against 1 for all `like`; see fusion.combine_queries.
        words: Words of the items' texts; items that hold any are fused with those that are similar
            by reciprocal rank fusion, and scores are then those of the fusion.

    Raises:
        InputError: If there is nothing to be like, or not one weight for each part.
    """

    like: Part | Sequence[Part]
    unlike: Part | Sequence[Part] = ()
    weights: Sequence[float] | None = None
    without: float = 0.5
    words: str | None = None

    def __post_init__(self) -> None:
        if not self.wanted:
            raise InputError("Query: nothing to be like. Name a text, an image or a vector.")
        if len(self.shares) != len(self.wanted):
            raise InputError(
                f"Query: got {len(self.shares)} weights for {len(self.wanted)} parts of `like`, "
                "expected one each."
            )

    @property
    def wanted(self) -> tuple[Part, ...]:
        """The parts of `like`."""
        return _parts(self.like)

    @property
    def unwanted(self) -> tuple[Part, ...]:
        """The parts of `unlike`."""
        return _parts(self.unlike)

    @property
    def shares(self) -> tuple[float, ...]:
        """A weight for each part of `like`."""
        return (1.0,) * len(self.wanted) if self.weights is None else tuple(self.weights)


def _parts(given: Part | Sequence[Part]) -> tuple[Part, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (cast("Part", given),)
