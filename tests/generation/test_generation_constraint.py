"""Texts that match a schema, an expression, a grammar or one of several choices."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmedge.errors import BackendUnavailableError, InputError
from mmedge.generation import Constraint, GenerationOptions
from mmedge.generation.constraint import Vocabulary
from mmedge.models.generator import Generator

SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(gpt2_bundle: Path) -> Any:
    with Generator.load(gpt2_bundle, precision="fp32") as loaded:
        yield loaded


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_of_a_schema(model: Generator, temperature: float) -> None:
    constraint = Constraint.json_schema(SCHEMA)
    options = GenerationOptions(temperature=temperature, seed=3, constraint=constraint)
    made = model.complete("a red circle", options=options, max_new_tokens=100)
    found = json.loads(made.text)
    assert made.finish == "end"
    assert found.keys() == {"colour", "count"}
    assert found["colour"] in {"red", "green"}
    assert 0 <= found["count"] <= 99


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint.regex("[a-c]{3}-[0-9]{2}"), "[a-c]{3}-[0-9]{2}"),
        (Constraint.choice(["red", "größer", 'a "b"']), 'red|größer|a "b"'),
        (Constraint.grammar('start: "x" "y"+ "z"'), "xy+z"),
    ],
)
def test_texts_that_match(model: Generator, constraint: Constraint, pattern: str) -> None:
    options = GenerationOptions(constraint=constraint, temperature=1.0, seed=1)
    made = model.complete_all(["hello", "a"], options=options, max_new_tokens=100)
    for one in made:
        assert one.finish == "end"
        assert re.fullmatch(pattern, one.text), one.text


def test_lookup_takes_the_same_under_a_constraint(model: Generator) -> None:
    constraint = Constraint.regex("(ab)+c")
    plain = GenerationOptions(constraint=constraint)
    ahead = GenerationOptions(constraint=constraint, lookup=4)
    prompt = "abababab"
    assert (
        model.complete(prompt, options=ahead, max_new_tokens=20).tokens
        == model.complete(prompt, options=plain, max_new_tokens=20).tokens
    )


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (Constraint.json_schema({"type": "nope"}), "nope"),
        (Constraint.regex("(a"), "regex"),
        (Constraint.regex(r"[^\s\S]"), "no text can match regex"),
        (Constraint.grammar("start: missing"), "missing"),
    ],
)
def test_what_cannot_be_met_is_refused(
    model: Generator, constraint: Constraint, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.complete("hello", options=GenerationOptions(constraint=constraint))


@pytest.mark.parametrize("texts", [[], ["a", ""], "red"])
def test_choices_that_are_none(texts: Any) -> None:
    with pytest.raises(InputError, match="choice"):
        Constraint.choice(texts)


@pytest.mark.parametrize(
    "text",
    ["a\n", 'q"', "\\d", "é", "\x00x", "\x7f", "\U0001f600", "/i", "\f\b", "a b", "#-&~<>", "(?i)"],
)
def test_choices_are_taken_as_they_are(model: Generator, text: str) -> None:
    options = GenerationOptions(constraint=Constraint.choice([text, text + "?"]))
    made = model.complete("hello", options=options, max_new_tokens=60)
    assert made.text in {text, text + "?"}


def test_many_choices(model: Generator) -> None:
    options = GenerationOptions(constraint=Constraint.choice([f"n {i}" for i in range(9000)]))
    made = model.complete("hello", options=options, max_new_tokens=60)
    assert re.fullmatch("n [0-9]{1,4}", made.text)


def _chain(count: int) -> str:
    rules = "\n".join(f'r{at}: "a" r{at + 1}' for at in range(count))
    return f'start: r0\n{rules}\nr{count}: "b"'


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("json", "{}", "got kind 'json', expected one of"),
        ("regex", "a" * (2 << 20), "got 2097152 bytes, expected at most"),
        ("grammar", _chain(20000), "got a grammar with 20002 colons"),
        ("json_schema", json.dumps(dict.fromkeys(map(str, range(2000)))), "with 2000 colons"),
    ],
)
def test_constraints_that_are_too_large(kind: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Constraint(kind, content)


def test_the_longest_chain_of_rules_is_compiled(model: Generator) -> None:
    options = GenerationOptions(constraint=Constraint.grammar(_chain(1498)))
    assert model.complete("x", options=options, max_new_tokens=4).text == "aaaa"


@pytest.mark.parametrize("value", [object(), {1, 2}])
def test_a_schema_that_json_cannot_hold(value: object) -> None:
    with pytest.raises(InputError, match="Pass what JSON can hold"):
        Constraint.json_schema({"enum": [value]})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendUnavailableError, match=r"mmedge\[constrain\]"):
        Vocabulary(tmp_path / "tokenizer.json", 10, [1])
