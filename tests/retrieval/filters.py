"""Strategies of filters and items for the tests of retrieval."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from mmedge.retrieval.filters import And, Eq, Filter, In, Not, Or, Range
from mmedge.retrieval.items import Item

VECTOR = np.ones((1, 1), np.float32)
NAMES = ["tag", "n", "ä b", "Not", "a.b", "$", "in", "2x"]
TEXTS = ["", "1", "true", "kitchen", 'a "quoted\\" text', "Ä\n🐈", "2026-01-01", "%_'--"]
NUMBERS = [0, 1, -3, 1.0, 0.1, 2.5, -0.0, 1e300, 5e-324, 0.1 + 0.2, 2**53 + 1, 2**63 - 1, -(2**63)]

texts = st.sampled_from(TEXTS) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5
)
integers = st.integers(-(2**63), 2**63 - 1)
decimals = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 9))
numbers = st.sampled_from(NUMBERS) | integers | decimals
values = texts | numbers | st.booleans()
times = st.sampled_from([0.0, 1767225600.0, 1767225600.25, -1.5, 4e17]) | st.floats(-1e11, 1e11)


def leaves(field: str, of: st.SearchStrategy[object]) -> st.SearchStrategy[Filter]:
    sets = st.lists(of, min_size=1, max_size=4).map(tuple)
    return st.builds(Eq, st.just(field), of) | st.builds(In, st.just(field), sets)


def ranges(field: str, of: st.SearchStrategy[float]) -> st.SearchStrategy[Filter]:
    drawn = st.builds(
        Range, st.just(field), st.none() | of, st.none() | of, st.booleans(), st.booleans()
    )
    return drawn.filter(lambda one: (one.low, one.high) != (None, None)).map(_closed)


def _closed(one: Range) -> Range:
    """A side without a bound is neither open nor closed; the text form knows one spelling."""
    return Range(
        one.field,
        one.low,
        one.high,
        one.low is not None and one.low_open,
        one.high is not None and one.high_open,
    )


conditions = st.one_of(
    st.sampled_from(NAMES).flatmap(lambda name: leaves(name, values)),
    st.sampled_from(NAMES).flatmap(lambda name: ranges(name, numbers)),
    st.sampled_from(["id", "source"]).flatmap(lambda name: leaves(name, texts)),
    leaves("time", times),
    ranges("time", times),
)
filters = st.recursive(
    conditions,
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(And, st.lists(inner, min_size=2, max_size=3).map(tuple))
        | st.builds(Or, st.lists(inner, min_size=2, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
items = st.builds(
    Item,
    id=texts,
    vectors=st.just(VECTOR),
    time=st.none() | times,
    source=st.none() | texts,
    metadata=st.dictionaries(
        st.sampled_from(NAMES),
        values | st.none() | st.lists(texts, max_size=3),
        max_size=4,
    ),
)
