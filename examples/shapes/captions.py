"""Captions of a scene, in several wordings."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from world import Scene, Thing, relation

_OPENINGS = (
    "", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ",
    "a scene with ", "there is ", "this picture shows ", "we see ",
)  # fmt: skip
_COUNTS = {2: "two", 3: "three", 4: "four"}
_ZONES: dict[tuple[str, str], tuple[str, ...]] = {
    ("top", "left"): ("at the top left", "in the top left corner", "in the upper left"),
    ("top", "centre"): ("at the top", "at the top centre", "in the upper middle"),
    ("top", "right"): ("at the top right", "in the top right corner", "in the upper right"),
    ("middle", "left"): ("on the left", "at the left side", "at the middle left"),
    ("middle", "centre"): ("in the centre", "in the middle", "at the centre"),
    ("middle", "right"): ("on the right", "at the right side", "at the middle right"),
    ("bottom", "left"): ("at the bottom left", "in the bottom left corner", "in the lower left"),
    ("bottom", "centre"): ("at the bottom", "at the bottom centre", "in the lower middle"),
    ("bottom", "right"): (
        "at the bottom right", "in the bottom right corner", "in the lower right",
    ),
}  # fmt: skip
_RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe every thing of a scene with size, colour, shape, and where or how many they are."""
    groups = _grouped(scene, rng)
    if len(groups) < len(scene.things):
        body = _group_caption(groups, rng)
    elif len(groups) == 1:
        body = _located(groups[0][0], rng)
    elif len(groups) == 2:
        body = _pair_caption(groups[0][0], groups[1][0], rng)
    else:
        body = _many_caption([group[0] for group in groups], rng)
    return _pick(_OPENINGS, rng) + body


def brief_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene loosely: true, but with less detail than ``caption``. For training only."""
    groups = _grouped(scene, rng)
    names = [_name(group, rng, with_size=bool(rng.random() < 0.4)) for group in groups]
    if len(names) > 2 and rng.random() < 0.3:
        names = names[:2]
    return _pick(_OPENINGS, rng) + _joined(names)


def relational_caption(scene: Scene) -> str:
    """Describe a scene of two things by their relation alone, in one fixed wording.

    Raises:
        ValueError: If the scene has not two things, or neither axis dominates between them.
    """
    between = relation(*scene.things) if len(scene.things) == 2 else None
    if between is None:
        raise ValueError("only two things, clearly beside or above one another, have a relation")
    first, second = (f"a {thing.size} {thing.label}" for thing in scene.things)
    return f"{first} {between} {second}"


def label_prompt(label: str, template: str = "a photo of a {label}") -> str:
    """Put a label into a prompt, with the article that the label's first letter asks for."""
    return re.sub(r"\ba orange", "an orange", template.format(label=label))


def _grouped(scene: Scene, rng: np.random.Generator) -> list[list[Thing]]:
    """Gather things of one kind, in random order of kinds."""
    kinds = list(Counter(thing.kind for thing in scene.things))
    return [[t for t in scene.things if t.kind == kinds[i]] for i in rng.permutation(len(kinds))]


def _group_caption(groups: list[list[Thing]], rng: np.random.Generator) -> str:
    names = [_name(group, rng) for group in groups]
    if len(groups) == 1:
        return names[0]
    between = {relation(a, b) for a in groups[0] for b in groups[1]}
    only = between.pop() if len(between) == 1 else None
    if only is not None and rng.random() < 0.7:
        return f"{names[0]} {_pick(_RELATIONS[only], rng)} {names[1]}"
    if rng.random() < 0.5:
        names = [
            f"{name} {_pick(_ZONES[group[0].zone], rng)}" if len(group) == 1 else name
            for name, group in zip(names, groups, strict=True)
        ]
    return _joined(names)


def _pair_caption(first: Thing, second: Thing, rng: np.random.Generator) -> str:
    between = relation(first, second)
    if between is None or rng.random() < 0.35:
        return _joined([_located(first, rng), _located(second, rng)])
    a, b = _name([first], rng), _name([second], rng)
    if rng.random() < 0.2:
        return f"{a} {_pick(_ZONES[first.zone], rng)}, {_pick(_RELATIONS[between], rng)} {b}"
    if rng.random() < 0.2:
        return f"{a} with {b} {_pick(_RELATIONS[_OPPOSITE[between]], rng)} it"
    return f"{a} {_pick(_RELATIONS[between], rng)} {b}"


def _many_caption(things: list[Thing], rng: np.random.Generator) -> str:
    between = relation(things[0], things[1])
    if between is None or rng.random() < 0.45:
        return _joined([_located(thing, rng) for thing in things])
    rest = [
        _located(thing, rng) if rng.random() < 0.6 else _name([thing], rng) for thing in things[2:]
    ]
    first, second = _name([things[0]], rng), _name([things[1]], rng)
    return f"{first} {_pick(_RELATIONS[between], rng)} {second}, with {_joined(rest)}"


def _located(thing: Thing, rng: np.random.Generator) -> str:
    return f"{_name([thing], rng)} {_pick(_ZONES[thing.zone], rng)}"


def _name(group: list[Thing], rng: np.random.Generator, *, with_size: bool = True) -> str:
    thing = group[0]
    words: list[str] = []
    if with_size:
        words.append(
            _pick({"small": ("small", "little"), "large": ("large", "big")}[thing.size], rng)
        )
    words += [thing.colour, thing.shape]
    if len(group) > 1:
        plural = thing.shape + ("es" if thing.shape == "cross" else "s")
        return " ".join([_COUNTS[len(group)], *words[:-1], plural])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _joined(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
