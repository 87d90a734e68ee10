"""Scenes of coloured shapes, drawn at random from a seed, with exact ground truth.

A scene is a handful of things on a quiet background. Positions and sizes are fractions of the
scene's square, so that one scene renders at any resolution (``drawing.render``); what is said about
a scene (``captions``) is read from these same numbers, so it is true by construction.

Splits are disjoint in two ways. Each split draws from random streams of its own. And the content of
a scene (which things, in which of the nine zones) is hashed to a bucket that belongs to one split
only: a test scene shares its content with no training scene, not even at other pixel positions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Split = Literal["train", "calibration", "test"]
Kind = Literal["single", "pair", "trio", "quad", "group", "group_pair"]
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (215, 38, 38),
    "orange": (247, 138, 20),
    "yellow": (246, 222, 45),
    "green": (40, 158, 60),
    "blue": (38, 84, 214),
    "purple": (138, 52, 178),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
SIZES: dict[str, tuple[float, float]] = {"small": (0.095, 0.115), "large": (0.17, 0.20)}
"""Size word to the range of radii, as fractions of the scene's side."""
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The label bank of zero-shot classification: every colour with every shape."""
SPLITS: dict[Split, range] = {
    "train": range(20, 100),
    "calibration": range(15, 20),
    "test": range(15),
}
"""Split to the buckets, out of a hundred, that its scenes' contents may hash to."""
KINDS: dict[Kind, float] = {
    "single": 0.15,
    "pair": 0.32,
    "trio": 0.25,
    "quad": 0.10,
    "group": 0.08,
    "group_pair": 0.10,
}
"""Kind of scene to its share of the world."""

_ZONE_EDGES = (0.38, 0.62)
_ZONE_GAP = 0.025
"""Minimum distance of a centre from a zone's edge, so that zone words are never ambiguous."""
_COLUMNS = ("left", "centre", "right")
_ROWS = ("top", "middle", "bottom")


@dataclass(frozen=True)
class Thing:
    """One shape. Lengths are fractions of the scene's side, the origin is the top left corner."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rotation_deg: float
    rgb: Rgb

    @property
    def label(self) -> str:
        """Colour and shape, as in ``LABELS``."""
        return f"{self.colour} {self.shape}"

    @property
    def kind(self) -> tuple[str, str, str]:
        """What the thing is, wherever it is: (size, colour, shape)."""
        return (self.size, self.colour, self.shape)

    @property
    def zone(self) -> tuple[str, str]:
        """Row and column of the three by three zones: ("top", "left") to ("bottom", "right")."""
        row = int(self.y > _ZONE_EDGES[0]) + int(self.y > _ZONE_EDGES[1])
        column = int(self.x > _ZONE_EDGES[0]) + int(self.x > _ZONE_EDGES[1])
        return (_ROWS[row], _COLUMNS[column])


@dataclass(frozen=True)
class Scene:
    """Things on a background that runs evenly from ``sky`` at the top to ``ground`` below."""

    things: tuple[Thing, ...]
    sky: Rgb
    ground: Rgb

    @property
    def label(self) -> str | None:
        """The label of the only thing, or None where there are several."""
        return self.things[0].label if len(self.things) == 1 else None

    def content(self) -> tuple[tuple[str, ...], ...]:
        """What is where, to the zone: sorted (size, colour, shape, row, column) of each thing."""
        return tuple(sorted((*thing.kind, *thing.zone) for thing in self.things))

    def bucket(self) -> int:
        """The content's hash, 0 to 99; it decides which split the scene belongs to."""
        return bucket_of(self.content())

    def split(self) -> Split:
        """The one split that may hold this scene."""
        return split_of(self.bucket())


def bucket_of(content: tuple[object, ...]) -> int:
    """Return the hash of a content, 0 to 99."""
    digest = hashlib.sha256(repr(content).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def split_of(bucket: int) -> Split:
    """Return the one split that a bucket belongs to."""
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def relation(first: Thing, second: Thing) -> str | None:
    """Return where ``first`` is from ``second`` along the longer axis.

    Returns:
        "left of", "right of", "above" or "below"; None where neither axis clearly dominates.
    """
    dx, dy = first.x - second.x, first.y - second.y
    if abs(abs(dx) - abs(dy)) < 0.05:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def draw_scene(rng: np.random.Generator, kind: Kind | None = None) -> Scene:
    """Draw one scene of the given kind, or of a kind drawn by its share of the world."""
    if kind is None:
        shares = np.array(list(KINDS.values()))
        kind = list(KINDS)[int(rng.choice(len(KINDS), p=shares / shares.sum()))]
    while True:
        things = _place(rng, _cast(rng, kind))
        if things is not None:
            return Scene(things, _quiet_colour(rng), _quiet_colour(rng))


def scene_at(split: Split, index: int, seed: int = 0, kind: Kind | None = None) -> Scene:
    """Return scene ``index`` of a split: a pure function of its arguments."""
    return _draw_within(split, np.random.default_rng(_entropy(split, index, seed)), kind)


def scenes(split: Split, count: int, seed: int = 0, kind: Kind | None = None) -> list[Scene]:
    """Return ``count`` scenes of a split, no two of the same content where the split allows it.

    Scenes of one thing, and groups, have few contents; once a hundred draws in a row repeat what
    is there already, repeats of content (at other positions, sizes and colours) are let in.
    """
    found: list[Scene] = []
    seen: set[tuple[tuple[str, ...], ...]] = set()
    index = repeats = 0
    while len(found) < count:
        scene = scene_at(split, index, seed, kind)
        index += 1
        if scene.content() in seen and repeats < 100:
            repeats += 1
            continue
        repeats = 0 if scene.content() not in seen else repeats
        seen.add(scene.content())
        found.append(scene)
    return found


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Return a scene that differs in one respect only, within the same split.

    The colours of two things change places, the image is mirrored, or one thing changes its
    colour or its shape. Such pairs teach, and test, what a bag of words cannot distinguish.

    Returns:
        The other scene; None where no change of this scene stays in its split.
    """
    for _ in range(24):
        other = _change(scene, rng)
        if other is None or other.content() == scene.content():
            continue
        if other.split() == scene.split():
            return other
    return None


def mirrored(scene: Scene, axis: Literal["x", "y"]) -> Scene:
    """Return the scene with left and right ("x") or top and bottom ("y") exchanged."""
    if axis == "x":
        things = tuple(replace(t, x=1.0 - t.x, rotation_deg=-t.rotation_deg) for t in scene.things)
    else:
        things = tuple(replace(t, y=1.0 - t.y) for t in scene.things)
    return replace(scene, things=things)


def exchanged(scene: Scene, first: int, second: int) -> Scene:
    """Return the scene in which two things, named by index, have exchanged their colours."""
    things = list(scene.things)
    a, b = things[first], things[second]
    things[first] = replace(a, colour=b.colour, rgb=b.rgb)
    things[second] = replace(b, colour=a.colour, rgb=a.rgb)
    return replace(scene, things=tuple(things))


def _entropy(split: Split, index: int, seed: int) -> list[int]:
    """Seed words that no other split, index or seed shares."""
    return [seed, list(SPLITS).index(split), index]


def _draw_within(split: Split, rng: np.random.Generator, kind: Kind | None) -> Scene:
    buckets = SPLITS[split]
    while True:
        scene = draw_scene(rng, kind)
        if scene.bucket() in buckets:
            return scene


def _cast(rng: np.random.Generator, kind: Kind) -> list[tuple[str, str, str]]:
    """Choose the (size, colour, shape) of every thing of a scene."""
    if kind == "group":
        return [_any_kind(rng)] * int(rng.integers(2, 5))
    if kind == "group_pair":
        group = _any_kind(rng)
        return [group] * int(rng.integers(2, 4)) + [_other_kind(rng, [group])]
    cast: list[tuple[str, str, str]] = []
    for _ in range({"single": 1, "pair": 2, "trio": 3, "quad": 4}[kind]):
        cast.append(_other_kind(rng, cast))
    return cast


def _any_kind(rng: np.random.Generator) -> tuple[str, str, str]:
    size = list(SIZES)[int(rng.integers(len(SIZES)))]
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return (size, colour, SHAPES[int(rng.integers(len(SHAPES)))])


def _other_kind(
    rng: np.random.Generator, taken: list[tuple[str, str, str]]
) -> tuple[str, str, str]:
    """Draw a kind whose colour and shape together are not taken, so that a label names it."""
    while True:
        kind = _any_kind(rng)
        if all(kind[1:] != other[1:] for other in taken):
            return kind


def _place(rng: np.random.Generator, cast: list[tuple[str, str, str]]) -> tuple[Thing, ...] | None:
    """Put the cast where nothing overlaps; None where it does not fit."""
    things: list[Thing] = []
    for size, colour, shape in cast:
        for _ in range(40):
            radius = float(rng.uniform(*SIZES[size]))
            x, y = (float(v) for v in rng.uniform(radius + 0.02, 0.98 - radius, size=2))
            edges_clear = all(abs(v - e) > _ZONE_GAP for v in (x, y) for e in _ZONE_EDGES)
            if edges_clear and all(_apart(x, y, radius, other) for other in things):
                rotation = float(rng.uniform(-12.0, 12.0))
                rgb = _jittered(rng, COLOURS[colour])
                things.append(Thing(colour, shape, size, x, y, radius, rotation, rgb))
                break
        else:
            return None
    return tuple(things)


def _apart(x: float, y: float, radius: float, other: Thing) -> bool:
    return float(np.hypot(x - other.x, y - other.y)) > radius + other.radius + 0.02


def _jittered(rng: np.random.Generator, rgb: Rgb) -> Rgb:
    red, green, blue = (int(v) for v in np.clip(np.array(rgb) + rng.integers(-14, 15, 3), 0, 255))
    return (red, green, blue)


def _quiet_colour(rng: np.random.Generator) -> Rgb:
    """A greyish mid tone on which every colour of the palette stands out."""
    red, green, blue = (int(v) for v in rng.integers(105, 190) + rng.integers(-14, 15, 3))
    return (red, green, blue)


def _change(scene: Scene, rng: np.random.Generator) -> Scene | None:
    things = scene.things
    choice = int(rng.integers(5))
    if choice == 0:
        return mirrored(scene, "x")
    if choice == 1:
        return mirrored(scene, "y")
    if choice == 2 and len(things) > 1:
        first, second = (int(v) for v in rng.choice(len(things), 2, replace=False))
        return exchanged(scene, first, second)
    where = int(rng.integers(len(things)))
    old = things[where]
    _, colour, shape = _any_kind(rng)
    if choice == 3:
        new = replace(old, shape=shape)
    else:
        new = replace(old, colour=colour, rgb=_jittered(rng, COLOURS[colour]))
    if any(new.kind[1:] == t.kind[1:] for i, t in enumerate(things) if i != where):
        return None
    return replace(scene, things=(*things[:where], new, *things[where + 1 :]))
