"""Text of tokens as they come: whole characters, and no part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.generation.texts import TextBuilder


def as_bytes(tokens: Sequence[int]) -> str:
    """A tokenizer of bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def as_words(tokens: Sequence[int]) -> str:
    """A tokenizer that writes a space between words alone."""
    return " ".join("abcdefgh"[token % 8] * (1 + token % 3) for token in tokens)


@given(st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=20))
def test_a_piece_holds_whole_characters(text: str) -> None:
    builder = TextBuilder(as_bytes)
    pieces = [builder.add(token) for token in text.encode()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert builder.finish() == ""
    assert "".join(pieces) == builder.text == text


@given(st.lists(st.integers(0, 255), max_size=24))
def test_any_bytes_become_the_text_of_all_tokens(tokens: list[int]) -> None:
    builder = TextBuilder(as_bytes)
    pieces = [builder.add(token) for token in tokens] + [builder.finish()]
    assert "".join(pieces) == builder.text
    assert builder.text.replace("\ufffd", "") == as_bytes(tokens).replace("\ufffd", "")


def test_spaces_between_words_are_kept() -> None:
    tokens = [1, 5, 2, 7, 7, 3]
    builder = TextBuilder(as_words)
    assert "".join([*map(builder.add, tokens), builder.finish()]) == as_words(tokens)


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_ends_it_wherever_tokens_begin(text: str, stops: list[str]) -> None:
    builder = TextBuilder(as_bytes, stops)
    pieces, taken = [], 0
    for token in text.encode():
        pieces.append(builder.add(token))
        taken += 1
        if builder.stopped:
            break
    pieces.append(builder.finish())
    places = [text.find(stop) for stop in stops if stop in text]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert builder.stopped == bool(places)
    if places:
        assert taken == min(ends)
        first = min(at for at, end in zip(places, ends, strict=True) if end == taken)
        assert builder.text == text[:first]
    else:
        assert builder.text == text
    assert "".join(pieces) == builder.text


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (("cd",), ["a", "b", "", "ce"]),
        (("ef",), ["a", "b", "c", "", "e"]),
    ],
)
def test_only_what_may_begin_a_stop_text_is_held_back(
    stop: tuple[str, ...], pieces: list[str]
) -> None:
    builder = TextBuilder(as_bytes, stop)
    got = [builder.add(token) for token in b"abce"]
    rest = builder.finish()
    assert [*got, rest][: len(pieces)] == pieces
    assert builder.text == "abce"


def test_half_a_character_at_the_end_is_marked() -> None:
    builder = TextBuilder(as_bytes)
    assert [builder.add(token) for token in "é".encode()[:1]] == [""]
    assert builder.finish() == "\ufffd" == builder.text
