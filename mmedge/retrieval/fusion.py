"""Combining queries into one vector, and rankings into one ranking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError
from mmedge.specs import Float32Array

__all__ = ["RRF_CONSTANT", "combine_queries", "fuse_rankings"]

RRF_CONSTANT = 60
"""Of reciprocal rank fusion; the value of its paper."""

_NOTHING = 1e-6  # length of a sum of unit vectors that cancel


def combine_queries(
    like: Float32Array, weights: Sequence[float], unlike: Float32Array, without: float
) -> Float32Array:
    """Return one query for several things to be like and some not to be like.

    The query is the direction of sum(w * like) / sum(w) - without * mean(unlike): relevance
    feedback in a vector space (J. J. Rocchio, Relevance Feedback in Information Retrieval, in The
    SMART Retrieval System, 1971). An item's score is linear in its vector, so it gains by each of
    the wanted and loses by the unwanted, and one search finds the best.

    Args:
        like: (Q, D) float32, L2-normalised.
        weights: Q positive numbers.
        unlike: (U, D) float32, L2-normalised; U may be 0.
        without: Weight of what is unlike, against 1 for all that is like.

    Returns:
        (D,) float32, L2-normalised.

    Raises:
        InputError: If a weight is not positive, or nothing is left of the query.
    """
    shares = np.asarray(weights, np.float64)
    if shares.shape != (len(like),) or not np.all(np.isfinite(shares) & (shares > 0)):
        raise InputError(
            f"Weights of a query: got {list(weights)}, expected {len(like)} positive numbers. "
            "Name what is not wanted in `unlike`."
        )
    if not (np.isfinite(without) and without >= 0):
        raise InputError(f"Weight of `unlike`: got {without}, expected a number from 0.")
    query = shares @ like.astype(np.float64) / shares.sum()
    if len(unlike):
        query = query - without * unlike.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(query)
    if length < _NOTHING:
        raise InputError(
            "The query's parts cancel each other: nothing is left to search for. Give less weight "
            "to `unlike`, or drop one of the opposites."
        )
    combined: Float32Array = (query / length).astype(np.float32)
    return combined


def fuse_rankings(
    rankings: Sequence[NDArray[np.int64]], constant: int = RRF_CONSTANT
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Merge rankings by reciprocal rank fusion.

    The score of an item is the sum of 1 / (constant + rank) over the rankings that hold it, ranks
    starting at 1 (G. V. Cormack, C. L. A. Clarke and S. Buettcher, Reciprocal Rank Fusion
    outperforms Condorcet and individual Rank Learning Methods, SIGIR 2009).

    Args:
        rankings: Item keys, best first; none twice in one ranking.
        constant: Lowers the weight of the first ranks.

    Returns:
        Keys (N,) int64 and scores (N,) float64, descending; of equal scores the item that comes
        first in the earlier ranking is first.
    """
    keys = np.concatenate([*rankings, np.empty(0, np.int64)])
    shares = [1 / (constant + np.arange(1, len(ranking) + 1)) for ranking in rankings]
    unique, first, place = np.unique(keys, return_index=True, return_inverse=True)
    scores = np.zeros(len(unique))
    np.add.at(scores, place, np.concatenate([*shares, np.empty(0)]))
    order = np.lexsort((first, -scores))
    return unique[order], scores[order]
