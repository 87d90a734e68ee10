"""Cleaning of texts, against what open_clip and ftfy gave for them (open_clip 3.3, ftfy 6.3)."""

# ruff: noqa: RUF001 -- the letters that are cleaned

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.preprocess.cleaning import CLEANING_WORDS, Cleaning, clean

FTFY = [
    ("A  Photo\tof\na CAT ", "a photo of a cat"),
    ("&amp;amp;lt; &NTILDE;&nTILDE; P&eacute;rez", "< ñ&ntilde; pérez"),
    ("a < b &eacute; &copy 2", "a < b é © 2"),  # by html.unescape, after ftfy
    ("&#150; &#x1F600; &#0; &nosuch;", "– 😀 \ufffd &nosuch;"),
    ("ﬂubberiﬁc ŉ ǅ", "flubberific 'n dž"),
    ("ＬＯＵＤ　ｶﾞ ＆amp;", "loud ガ &"),
    ("“curly” ‘quotes’ ʼn", "\"curly\" 'quotes' 'n"),
    ("\x1b[36;44mblue\x1b[0m \x00\x7f\ufeffx", "blue x"),
    ("wide\x85 \x9d e\u0301", "wide… \x9d é"),
    ("ΟΔΟΣ İ", "οδος i\u0307"),
    ("one\r\ntwo\u2028three\x1cfour", "one two threefour"),
]


@pytest.mark.parametrize(("text", "expected"), FTFY)
def test_text_is_cleaned_as_open_clip_cleans_it(text: str, expected: str) -> None:
    assert clean(text, "lower") == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("lower", "red_box & two  squares!".replace("  ", " ")),
        ("whitespace", "RED_box & Two squares!"),
        ("canonicalize", "red box two squares"),
        ("siglip", "redbox amp two squares"),
        ("strip", "RED_box &amp;  Two\nsquares!"),
        ("strip_lower", "red_box &amp;  two\nsquares!"),
    ],
)
def test_each_way_of_cleaning(how: Cleaning, expected: str) -> None:
    assert clean(" RED_box &amp;  Two\nsquares! ", how) == expected
    assert how in CLEANING_WORDS


@given(st.text(max_size=30), st.sampled_from(["lower", "whitespace", "canonicalize"]))
def test_cleaning_leaves_single_spaces_and_is_idempotent(text: str, how: Cleaning) -> None:
    cleaned = clean(text, how)
    assert cleaned is not None
    assert cleaned == " ".join(cleaned.split())


def test_ordinary_text_is_passed_on() -> None:
    assert clean("a photo of a cat, 3 wheels", "whitespace") == "a photo of a cat, 3 wheels"


@pytest.mark.parametrize("text", ["&" + "amp;" * 200_000, "＆" + "#65286;" * 1000])
def test_escapes_in_escapes_end(text: str) -> None:
    assert clean(text, "lower") is None
