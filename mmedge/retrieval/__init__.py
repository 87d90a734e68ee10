"""Search on the device: an index of embeddings with their ids, times, sources and metadata."""

from mmedge.retrieval.filter_text import filter_text, parse_filter
from mmedge.retrieval.filters import And, Eq, Filter, In, Not, Or, Range
from mmedge.retrieval.queries import Query

__all__ = [
    "And",
    "Eq",
    "Filter",
    "In",
    "Not",
    "Or",
    "Query",
    "Range",
    "filter_text",
    "parse_filter",
]
