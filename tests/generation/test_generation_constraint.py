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


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendUnavailableError, match=r"mmedge\[constrain\]"):
        Vocabulary(tmp_path / "tokenizer.json", 10, [1])
