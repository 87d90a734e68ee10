"""Cleaning of texts before tokenization, as the training code of a model cleaned its captions.

open_clip's functions pass a text through ftfy.fix_text and html.unescape first. `_fix_text` does
what ftfy does (release 6), but for the repair of text that was decoded in a wrong encoding
(mojibake, as in "voilÃ "): that guesses by a large table of letters, for text that a program should
have decoded as UTF-8. ftfy guesses so where `ftfy.badness.is_bad(text)`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache
from typing import Literal, TypeAlias

__all__ = ["CLEANING_WORDS", "Cleaning", "clean"]

Cleaning: TypeAlias = Literal[
    "siglip", "lower", "whitespace", "canonicalize", "strip", "strip_lower"
]

_FIXES = (
    "Apply ftfy.fix_text (release 6) without fix_encoding, then unescape HTML twice, as Python's "
    "html.unescape does"
)
_PUNCTUATION = "remove the ASCII punctuation !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_FOLD = "fold runs of white space into one space, and trim both ends"
CLEANING_WORDS: dict[str, str] = {
    "siglip": f"Turn U+2581 into a space, lower-case, {_PUNCTUATION}, {_FOLD}.",
    "lower": f"{_FIXES}, {_FOLD}, and lower-case.",
    "whitespace": f"{_FIXES}, {_FOLD}.",
    "strip": "Remove white space at both ends.",
    "strip_lower": "Remove white space at both ends, and lower-case.",
    "canonicalize": f"{_FIXES}, turn _ into a space, {_PUNCTUATION}, lower-case, {_FOLD}.",
}
"""Each cleaning in words, for programs in other languages."""

_MAX_PASSES = 16  # each undoes one level of HTML escapes
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHITE_SPACE = re.compile(r"\s+")
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029\x85]")
_TERMINAL_ESCAPE = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
_C1_CONTROLS = {
    code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)
}
# Latin ligatures and digraphs, half and full width, and quotation marks: in this order.
_LIGATURES = str.maketrans(
    {
        "Ĳ": "IJ", "ĳ": "ij", "ŉ": "\u02bcn", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "D\u017d",
        "ǅ": "D\u017e", "ǆ": "d\u017e", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj",
        "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl",
        "ﬅ": "\u017ft", "ﬆ": "st",
    }
)  # fmt: skip
_WIDTHS = {
    0x3000: " ",
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
}
_QUOTES = {
    **dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}
_CONTROLS = dict.fromkeys(
    (*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF,
     *range(0xFFF9, 0xFFFD))
)  # fmt: skip


def clean(text: str, how: Cleaning) -> str | None:
    """Clean a text.

    Args:
        text: Without lone surrogates.
        how: See TextConfig.cleaning.

    Returns:
        The text; None where its HTML escapes are nested deeper than is undone.
    """
    if how == "siglip":
        text = text.replace("\u2581", " ").lower().translate(_NO_PUNCTUATION)
        return _WHITE_SPACE.sub(" ", text).strip()
    if how in {"strip", "strip_lower"}:
        return text.strip() if how == "strip" else text.strip().lower()
    fixed = _fix_text(text)
    if fixed is None:
        return None
    if "&" in fixed:
        from html import unescape  # a cold start without such texts is spared it

        fixed = unescape(unescape(fixed))
    text = fixed
    if how == "canonicalize":
        text = text.strip().replace("_", " ").translate(_NO_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if how == "lower" else text


def _fix_text(text: str) -> str | None:
    """Return `ftfy.fix_text(text, fix_encoding=False)`, line by line as that goes."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    fixed, unescape = [], True
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        unescape = unescape and "<" not in line
        repaired = _fix_line(line, unescape=unescape)
        if repaired is None:
            return None
        fixed.append(repaired)
    return "".join(fixed)


def _fix_line(line: str, *, unescape: bool) -> str | None:
    for _ in range(_MAX_PASSES):
        before = line
        if unescape:
            line = _ENTITY.sub(_character, line)
        line = line.translate(_C1_CONTROLS).translate(_LIGATURES).translate(_WIDTHS)
        line = _LINE_BREAK.sub("\n", line.translate(_QUOTES))
        line = _TERMINAL_ESCAPE.sub("", line).translate(_CONTROLS)
        line = unicodedata.normalize("NFC", line)
        if line == before:
            return line
    return None


def _character(match: re.Match[str]) -> str:
    """Return what one HTML entity stands for, itself where it is none."""
    entity = match[0]
    if not entity.startswith("&#"):
        return _entities().get(entity, entity)
    from html import unescape

    unescaped = unescape(entity)
    return entity if ";" in unescaped else unescaped


@lru_cache(maxsize=1)
def _entities() -> dict[str, str]:
    """Return what entities stand for, by name with & and ;."""
    from html import unescape
    from html.entities import html5

    named = {f"&{name}": text for name, text in html5.items() if name.endswith(";")}
    # ftfy also takes names in capitals, where they are no names of their own.
    capitals = {
        name.upper(): text.upper()
        for name, text in named.items()
        if name == name.lower() and unescape(name.upper()) == name.upper()
    }
    return {**capitals, **named}
