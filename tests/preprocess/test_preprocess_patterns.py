"""Which regular expressions of tokenizers are taken, and that those end on every text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from mmedge.preprocess.patterns import check_pattern

CLASS = r"[^\r\n\p{L}\p{N}]?"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = rf"{CLASS}[\p{{Lu}}\p{{Lt}}\p{{M}}]*[\p{{Ll}}\p{{M}}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
IN_USE = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "llama3": rf"(?i:'s|'d)|{CLASS}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}]+[\r\n]*|{ENDS}",
    "o200k": rf"{CASED}|{CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[一-龥ぁ-ゟ]+| ?[\p{P}\p{S}]+",
    "bloom": r" ?[^(\s|[.,!?…。、।])]+",
    "sentencepiece": r" {2,}",
    "white space": r"\s+",
    "nothing": "",
}
REFUSED = {
    "nested": r"(a+)+$",
    "alternatives repeated": r"(a|a|aa)+$",
    "counted within counted": r"(?:a{2,9}){2,9}",
    "repeated repetition": r"a**",
    "possessive count is another repetition": r"a{1,3}+",
    "many repetitions in a row": r"a*a*a*a*b",
    "many choices in a row": r"(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)b",
    "many optional parts": "a?" * 20 + "b",
    "large count": r"a{1,99999}",
    "large counts within": r"(?:(?:a{500}){500}){500}",
    "reference": r"(a*)b\1",
    "named reference": r"(?<n>a)\k<n>",
    "recursion": r"(?<n>a\g<n>?)",
    "absence": r"(?~a)",
    "code": r"(?{x})",
    "comments": r"(?x)a # (b",
    "flags that group what follows": r"a*a*a*(?i)|a*a*a*",
    "lookahead that searches": r"(?=.*a)x",
    "set that holds nothing": r"[]a]",
    "open set": r"[a",
    "open group": r"(a",
    "group closed twice": r"a)",
    "deep": "(" * 100 + "a" + ")" * 100,
    "long": "a" * 20_000,
}


@pytest.mark.parametrize("pattern", IN_USE.values(), ids=list(IN_USE))
def test_patterns_in_use_are_taken(pattern: str) -> None:
    check_pattern(pattern)
    Regex(pattern)


@pytest.mark.parametrize("pattern", REFUSED.values(), ids=list(REFUSED))
def test_patterns_without_a_bound_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_pattern(pattern)


PIECES = ["a", "b", ".", r"\s", r"\p{L}", "[ab]", "[^b]", "(", "(?:", "(?=", "(?!", ")", "|", "*"]
PIECES += ["+", "?", "{2}", "{1,3}", "{2,}", "^", "$", r"\1", "(?i:", "[a&&[b]]", "{,4}", "(?>"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@settings(max_examples=400, deadline=None)
def test_a_pattern_that_is_taken_searches_no_text_for_long(pattern: str) -> None:
    """Oniguruma gives up after ten million steps: with a panic, which no accepted pattern meets."""
    try:
        check_pattern(pattern)
    except ValueError:
        return
    try:
        split = Split(Regex(pattern), "isolated")
    except Exception:  # noqa: BLE001, what the library raises for a bad pattern
        return
    for text in ("a" * 40, "a" * 40 + "!", "ab" * 20 + " ", " " * 40 + "b"):
        split.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pattern", "shortest"),
    [
        ("", 0),
        ("^", 0),
        (r"\b", 0),
        ("a", 1),
        (r"\s+", 1),
        (r"\s*", 0),
        (" {2,}", 2),
        ("ab?c{2,3}", 3),
        ("abc|d", 1),
        ("(?:ab){3}|(?=a)", 0),
        ("a(?!bc)", 1),
        ("x|", 0),
    ],
)
def test_how_much_a_pattern_matches_at_least(pattern: str, shortest: int) -> None:
    assert check_pattern(pattern) == shortest
