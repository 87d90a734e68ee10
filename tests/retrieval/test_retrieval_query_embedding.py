"""What counts as one query or several, as a text, an image or a vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedge.errors import InputError, ShapeError
from mmedge.retrieval import Query
from mmedge.retrieval.query_embedding import embedded_queries
from mmedge.specs import Float32Array

DIM = 4
AXES = np.eye(DIM, dtype=np.float32)
FRAME = np.zeros((5, 6, 3), np.uint8)
IMAGE = Image.new("RGB", (3, 3))


class Embed:
    """Texts lie along the first axis and images along the second; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(
        self, *, texts: Sequence[str] | None = None, images: object = None
    ) -> Float32Array:
        self.calls.append("images" if texts is None else "texts")
        if texts is not None:
            return np.repeat(AXES[:1], len(texts), axis=0)
        several = isinstance(images, Iterable) and not isinstance(images, bytes | np.ndarray)
        return np.repeat(AXES[1:2], len(images) if several else 1, axis=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "single", "vectors"),
    [
        ("a mug.jpg", True, AXES[:1]),
        (["a", "b"], False, AXES[[0, 0]]),
        (Path("a.jpg"), True, AXES[1:2]),
        (b"\xff\xd8", True, AXES[1:2]),
        (FRAME, True, AXES[1:2]),
        ([IMAGE, IMAGE], False, AXES[[1, 1]]),
        (3 * AXES[2], True, AXES[2:3]),
        (AXES[2:].astype(np.float64), False, AXES[2:]),
        ([AXES[2], AXES[3]], False, AXES[2:]),
        (AXES[2:3], False, AXES[2:3]),
        ([], False, AXES[:0]),
        (Query("a"), True, AXES[:1]),
        ([Query("a"), Query(IMAGE)], False, AXES[:2]),
    ],
)
def test_one_or_several(query: object, single: bool, vectors: Float32Array) -> None:
    got, words, alone = embedded_queries(query, Embed(), DIM)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, vectors)
    assert words == [None] * len(vectors)
    assert alone is single


def test_the_parts_of_all_queries_are_embedded_together() -> None:
    embed = Embed()
    queries = [
        Query(["a", IMAGE], weights=[3, 4]),
        Query(AXES[2], unlike=["b", FRAME], words="mug"),
    ]
    vectors, words, _ = embedded_queries(queries, embed, DIM)  # type: ignore[arg-type]
    assert embed.calls == ["texts", "images"]
    np.testing.assert_allclose(vectors[0], [0.6, 0.8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(vectors[1], np.array([-1, -1, 4, 0]) / 18**0.5, rtol=1e-6)
    assert words == [None, "mug"]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (AXES[0, :3], ShapeError, "width 3"),
        (Query(AXES[0, :3]), ShapeError, "width 3"),
        (0 * AXES[0], InputError, "zero"),
        (Query("a", unlike=IMAGE, without=-1), InputError, "a number from 0"),
        (Query(["a", "b"], weights=[1, 0]), InputError, "positive"),
    ],
)
def test_wrong_searches(query: Any, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        embedded_queries(query, Embed(), DIM)  # type: ignore[arg-type]
