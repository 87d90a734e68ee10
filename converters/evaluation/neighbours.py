"""Nearest neighbours compared sample by sample, in blocks of constant memory.

Embeddings are (N, D) and need not be normalised. One that is zero, or not finite, is near nothing:
nobody finds it before another, and what it looks for it does not find. Similarities that float32
cannot distinguish (closer than 1e-6) are a tie, and a tie counts as what a random order of its
members gives on average, so that no figure depends on the order of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.errors import ShapeError
from mmedge.specs import Array, Float32Array

__all__ = ["Ranks", "Search", "neighbour_agreement", "rank_correlation", "ranks_of_relevant"]

_TIE = 1e-6
# Below every cosine: what cannot be found, and the query itself where it does not count.
_NOWHERE, _ONESELF = -2.0, -3.0
# Similarities that one block holds: 8 MB of float32.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Search:
    """Queries and the vectors they search.

    Attributes:
        queries: (Q, D).
        vectors: (N, D).
        own: Whether query i is a sample of vector i, which then does not count as found.
    """

    queries: Float32Array
    vectors: Float32Array
    own: bool = False

    def __post_init__(self) -> None:
        """Check that the shapes match.

        Raises:
            ShapeError: If D differs, or Q and N do where queries are samples of the vectors.
        """
        queries, vectors = self.queries.shape, self.vectors.shape
        if len(queries) != 2 or len(vectors) != 2 or queries[1] != vectors[1]:
            raise ShapeError(f"Search: got {queries} in {vectors}, expected (Q, D) in (N, D).")
        if self.own and queries != vectors:
            raise ShapeError(f"Search: got {queries} in {vectors}, expected equal (N, D).")

    @property
    def others(self) -> int:
        """Number of candidate vectors of a query."""
        return len(self.vectors) - int(self.own)


def neighbour_agreement(
    truth: Search, found: Sequence[Search], k: int, *, block: int = _BLOCK
) -> Array:
    """Return the overlap of the k nearest of one search with those of others.

    A neighbour counts as right if the first search finds it at least as near as its k-th, so that
    equal vectors are interchangeable.

    Args:
        truth: What should be found.
        found: F searches with the same queries and vectors, embedded in other ways.
        k: 1 <= k <= the number of vectors that may be found.
        block: Similarities of a search held at once.

    Returns:
        (F, Q) float64 in [0, 1].

    Raises:
        ShapeError: If k is out of range, or the searches are not of the same samples.
    """
    for search in found:
        _check_alike(truth, search)
    if not 1 <= k <= truth.others:
        raise ShapeError(
            f"Neighbours: got k = {k}, expected 1 to {truth.others}, the vectors to be found."
        )
    blocks = zip(
        _similarities(truth, block),
        *(_similarities(search, block) for search in found),
        strict=True,
    )
    shares = []
    for (right, usable), *results in blocks:
        limit = _kth(right, k) - _TIE
        shares.append(
            [
                np.where(usable & valid, _share_right(right, limit, got, k), 0.0)
                for got, valid in results
            ]
        )
    return np.concatenate(shares, axis=1)


def _share_right(right: Array, limit: Array, got: Array, k: int) -> Array:
    """Return the share of the k nearest found that is right: (Q,).

    Args:
        right: (Q, N) similarities of the reference search.
        limit: (Q,) from where on they are right.
        got: (Q, N) similarities of the evaluated search.
        k: As above.
    """
    kth = _kth(got, k)
    rows, columns = np.nonzero(got >= kth[:, None] - _TIE)
    surely = got[rows, columns] > kth[rows] + _TIE
    correct = right[rows, columns] >= limit[rows]

    def per_query(which: Array) -> Array:
        return np.bincount(rows[which], minlength=len(got))

    # The k-th itself is one of those tied, so that none is a division by zero.
    luck = per_query(~surely & correct) / per_query(~surely)
    share: Array = (per_query(surely & correct) + (k - per_query(surely)) * luck) / k
    return share


def rank_correlation(truth: Search, found: Search, *, block: int = _BLOCK) -> Array:
    """Return Spearman's correlation of each query's similarities in two searches.

    C. Spearman, The Proof and Measurement of Association between Two Things, American Journal of
    Psychology 15, 1904: Pearson's correlation of the ranks; equal values share their mean rank.
    Where a query is equally near to all, there is nothing to agree on: 1 if so in both searches,
    else 0.

    Args:
        truth: One search.
        found: The same queries and vectors, embedded in another way.
        block: Similarities held at once.

    Returns:
        (Q,) float64 in [-1, 1].

    Raises:
        ShapeError: If the searches are not of the same samples.
    """
    _check_alike(truth, found)
    correlations = []
    start = 0
    for (right, usable), (got, valid) in zip(
        _similarities(truth, block), _similarities(found, block), strict=True
    ):
        if truth.own:
            others = np.arange(right.shape[1]) != start + np.arange(len(right))[:, None]
            right = right[others].reshape(len(right), -1)  # noqa: PLW2901
            got = got[others].reshape(len(got), -1)  # noqa: PLW2901
        left, other = _centred_ranks(right), _centred_ranks(got)
        spread = np.sqrt((left**2).sum(axis=1) * (other**2).sum(axis=1))
        flat = spread == 0
        both = flat & ~left.any(axis=1) & ~other.any(axis=1)
        values = (left * other).sum(axis=1) / np.where(flat, 1, spread)
        values = np.where(flat, both, values)
        correlations.append(np.where(usable & valid, values, 0.0))
        start += len(right)
    return np.concatenate(correlations)


@dataclass(frozen=True)
class Ranks:
    """Rank of each query's first relevant vector.

    Attributes:
        before: (Q,) how many others are nearer.
        tied: (Q,) how many others are as near.
        relevant: (Q,) how many relevant ones are as near, itself included; 0 if there is none.
    """

    before: Array
    tied: Array
    relevant: Array

    def hits(self, k: int) -> Array:
        """Return whether a relevant vector is among the k nearest: (Q,) float64 in [0, 1]."""
        # Of tied + relevant places in random order the first `places` are seen: the chance that
        # none of them is relevant is a product over these places.
        places = np.maximum(k - self.before, 0)
        missed = np.ones(len(self.before))
        for place in range(k):
            left = self.tied + self.relevant - place
            chance = np.maximum(self.tied - place, 0) / np.maximum(left, 1)
            missed = np.where(place < places, missed * chance, missed)
        return np.where(self.relevant > 0, 1 - missed, 0.0)


def ranks_of_relevant(
    search: Search, query_groups: Array, vector_groups: Array, *, block: int = _BLOCK
) -> Ranks:
    """Return the rank of the first vector of each query's group.

    Args:
        search: Queries and what they search.
        query_groups: (Q,) integers.
        vector_groups: (N,) integers; those with the query's number are relevant to it.
        block: Similarities held at once.

    Raises:
        ShapeError: If there is not one group for each query and vector.
    """
    for groups, rows in ((query_groups, search.queries), (vector_groups, search.vectors)):
        if np.shape(groups) != (len(rows),):
            raise ShapeError(f"Groups: got {np.shape(groups)}, expected ({len(rows)},).")
    before, tied, relevant = [], [], []
    start = 0
    for similarity, usable in _similarities(search, block):
        wanted = query_groups[start : start + len(similarity), None] == vector_groups
        wanted &= similarity > _NOWHERE
        best = np.where(wanted, similarity, _ONESELF).max(axis=1, keepdims=True)
        as_near = np.abs(similarity - best) <= _TIE
        before.append(np.count_nonzero(~wanted & (similarity > best + _TIE), axis=1))
        tied.append(np.count_nonzero(~wanted & as_near, axis=1))
        relevant.append(np.where(usable, np.count_nonzero(wanted & as_near, axis=1), 0))
        start += len(similarity)
    return Ranks(np.concatenate(before), np.concatenate(tied), np.concatenate(relevant))


def _check_alike(truth: Search, found: Search) -> None:
    shapes = [(len(search.queries), len(search.vectors), search.own) for search in (truth, found)]
    if shapes[0] != shapes[1]:
        raise ShapeError(
            f"Searches: got {shapes[1][0]} queries in {shapes[1][1]} vectors against "
            f"{shapes[0][0]} in {shapes[0][1]}; expected the same samples in both."
        )


def _similarities(search: Search, block: int) -> Iterator[tuple[Array, Array]]:
    """Yield cosines of some queries with all vectors, and which of the queries can be used."""
    queries, usable = _normalised(search.queries)
    vectors, findable = _normalised(search.vectors)
    rows = max(1, block // max(1, len(vectors)))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ vectors.T
        similarity[:, ~findable] = _NOWHERE
        if search.own:
            here = np.arange(len(similarity))
            similarity[here, start + here] = _ONESELF
        yield similarity, usable[start : start + rows]


def _normalised(rows: Float32Array) -> tuple[Float32Array, Array]:
    """Return rows of length 1, and which of them are; the others are zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    unit: Float32Array = np.zeros(rows.shape, np.float32)
    unit[usable] = rows[usable] / lengths[usable, None]
    return unit, usable


def _kth(similarity: Array, k: int) -> Array:
    """Return the k-th largest of each row."""
    place = similarity.shape[1] - k
    largest: Array = np.partition(similarity, place, axis=1)[:, place]
    return largest


def _centred_ranks(similarity: Array) -> Array:
    """Return the rank of each value in its row, less the mean rank; ties share their mean."""
    order = similarity.argsort(axis=1)
    ranked = np.take_along_axis(similarity, order, axis=1)
    places = np.arange(similarity.shape[1])
    starts = np.ones(similarity.shape, bool)
    # By their distance: rounded values fall apart where an edge of rounding lies between them.
    starts[:, 1:] = ranked[:, 1:] - ranked[:, :-1] > _TIE
    ends = np.ones(similarity.shape, bool)
    ends[:, :-1] = starts[:, 1:]
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    last = np.where(ends, places, places[-1])
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(similarity.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    centred: Array = ranks - (similarity.shape[1] - 1) / 2
    return centred
