"""From what a caller searches for to query vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeGuard, cast, overload

import numpy as np

from mmedge.models.images import image_sources
from mmedge.preprocess.decode import ImageSource
from mmedge.retrieval.fusion import combine_queries
from mmedge.retrieval.inputs import query_vectors
from mmedge.retrieval.queries import Query
from mmedge.specs import Float32Array, Modality

__all__ = ["Embed", "embedded_queries", "is_vector", "query_kind"]

_SEVERAL = "several"  # no kind that is measured


class Embed(Protocol):
    """Returns the (N, D) vectors of texts or images, as Index.embed does."""

    @overload
    def __call__(self, *, texts: Sequence[str]) -> Float32Array: ...

    @overload
    def __call__(self, *, images: ImageSource | Iterable[ImageSource]) -> Float32Array: ...


def embedded_queries(
    query: object, embed: Embed, dim: int
) -> tuple[Float32Array, list[str | None], bool]:
    """Return the vectors of what a caller searches for.

    Args:
        query: As for Index.search.
        embed: Encodes texts and images.
        dim: D.

    Returns:
        (Q, D) float32, L2-normalised; the words of each query; and whether it is a single one.

    Raises:
        InputError: If a query cannot be used.
    """
    if isinstance(query, Query):
        return _combined([query], embed, dim), [query.words], True
    if isinstance(query, list | tuple) and query and all(isinstance(q, Query) for q in query):
        return _combined(query, embed, dim), [each.words for each in query], False
    vectors, single = _plain(query, embed, dim)
    return vectors, [None] * len(vectors), single


def query_kind(query: object) -> str | None:
    """Return what a query is embedded from, for the number of lists that it takes.

    Returns:
        "text" or "image"; None for ready vectors; "several" for a mixture, which lies where none
        of its parts does.
    """
    if isinstance(query, Query):
        kind = query_kind(query.wanted)
        alone = len(query.wanted) == 1 or kind is not None
        return kind if alone and not query.unwanted else _SEVERAL
    if isinstance(query, list | tuple):
        kinds = {query_kind(each) for each in query}
        return kinds.pop() if len(kinds) == 1 else _SEVERAL
    if isinstance(query, str):
        return Modality.TEXT.value
    return None if is_vector(query) else Modality.IMAGE.value


def _plain(query: object, embed: Embed, dim: int) -> tuple[Float32Array, bool]:
    if isinstance(query, str):
        return embed(texts=[query]), True
    if is_vector(query):
        return query_vectors(query, dim), query.ndim == 1
    if isinstance(query, Sequence) and not isinstance(query, bytes | bytearray | memoryview):
        if not query:
            return np.empty((0, dim), np.float32), False
        if all(isinstance(each, str) for each in query):
            return embed(texts=query), False
        if all(_floats(each) for each in query):
            return np.concatenate([query_vectors(each, dim) for each in query]), False
    images = cast(ImageSource, query)
    return embed(images=images), image_sources(images) is None


def _combined(queries: Sequence[Query], embed: Embed, dim: int) -> Float32Array:
    """Embed the parts of all queries, texts and images together, and combine those of each."""
    parts = [part for query in queries for part in (*query.wanted, *query.unwanted)]
    vectors = np.empty((len(parts), dim), np.float32)
    texts = [place for place, part in enumerate(parts) if isinstance(part, str)]
    images = [place for place, part in enumerate(parts) if not isinstance(part, str)]
    for place in [place for place in images if _floats(parts[place])]:
        vectors[place] = query_vectors(cast(Float32Array, parts[place]), dim)
        images.remove(place)
    if texts:
        vectors[texts] = embed(texts=[cast(str, parts[place]) for place in texts])
    if images:
        vectors[images] = embed(images=[cast(ImageSource, parts[place]) for place in images])
    combined, start = [], 0
    for query in queries:
        middle = start + len(query.wanted)
        end = middle + len(query.unwanted)
        combined.append(
            combine_queries(vectors[start:middle], query.shares, vectors[middle:end], query.without)
        )
        start = end
    return np.stack(combined)


def is_vector(query: object) -> TypeGuard[Float32Array]:
    """Return whether a query is a vector (D,), or several (Q, D)."""
    return _floats(query) and query.ndim < 3


def _floats(part: object) -> TypeGuard[Float32Array]:
    return isinstance(part, np.ndarray) and part.dtype.kind == "f"
