"""The world of shapes: same seed, same scene; no scene in two splits; nothing untrue in a scene."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from drawing import bounding_box, pixel_box, render
from PIL import Image
from world import (
    COLOURS,
    KINDS,
    LABELS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Split,
    Thing,
    exchanged,
    mirrored,
    near_miss,
    relation,
    scene_at,
    scenes,
)

GREY = (140, 140, 140)


def _thing(x: float, y: float, colour: str = "red", shape: str = "circle") -> Thing:
    return Thing(colour, shape, "small", x, y, 0.1, 0.0, COLOURS[colour])


def test_the_same_seed_draws_the_same_scene() -> None:
    assert scene_at("train", 7, seed=3) == scene_at("train", 7, seed=3)
    assert scenes("test", 20) == scenes("test", 20)


def test_other_seeds_indices_and_splits_draw_others() -> None:
    drawn = {
        scene_at(split, index, seed) for split in SPLITS for index in range(5) for seed in range(3)
    }
    assert len(drawn) == 3 * 5 * 3


def test_scenes_do_not_depend_on_their_number() -> None:
    assert scenes("test", 50)[:20] == scenes("test", 20)


@pytest.mark.parametrize("split", list(SPLITS))
def test_every_scene_of_a_split_belongs_to_it(split: Split) -> None:
    assert all(scene.split() == split for scene in scenes(split, 60, seed=5))


def test_the_buckets_of_the_splits_cover_a_hundred_once() -> None:
    buckets = [bucket for split in SPLITS.values() for bucket in split]
    assert sorted(buckets) == list(range(100))


def test_no_content_is_shared_between_splits() -> None:
    contents = {split: {s.content() for s in scenes(split, 300)} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not contents[one] & contents[other]


def test_scenes_of_a_split_differ_in_content() -> None:
    drawn = scenes("test", 500)
    assert len({scene.content() for scene in drawn}) == 500


def test_scarce_contents_repeat_and_do_not_hang() -> None:
    singles = scenes("calibration", 200, kind="single")
    assert len(singles) == 200
    assert len(set(singles)) == 200


def test_things_lie_inside_apart_and_within_their_sizes() -> None:
    for scene in scenes("train", 150):
        for thing in scene.things:
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high
        for a, b in combinations(scene.things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("kind", list(KINDS))
def test_kinds_hold_their_fields(kind: str) -> None:
    counts = {"single": {1}, "pair": {2}, "trio": {3}, "quad": {4}}
    for scene in scenes("train", 20, kind=kind):  # type: ignore[arg-type]
        kinds = {thing.kind for thing in scene.things}
        if kind in counts:
            assert len(scene.things) == len(kinds)
            assert len(kinds) in counts[kind]
        elif kind == "group":
            assert len(kinds) == 1
            assert 2 <= len(scene.things) <= 4
        else:
            assert len(kinds) == 2
            assert 3 <= len(scene.things) <= 4


def test_only_single_scenes_have_a_label() -> None:
    for scene in scenes("train", 60):
        if len(scene.things) == 1:
            assert scene.label == scene.things[0].label
            assert scene.label in LABELS
        else:
            assert scene.label is None
    assert len(LABELS) == len(set(LABELS)) == 64


@pytest.mark.parametrize(
    ("x", "y", "zone"),
    [
        (0.1, 0.1, ("top", "left")),
        (0.5, 0.5, ("middle", "centre")),
        (0.9, 0.5, ("middle", "right")),
        (0.5, 0.9, ("bottom", "centre")),
    ],
)
def test_zones(x: float, y: float, zone: tuple[str, str]) -> None:
    assert _thing(x, y).zone == zone


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.2, 0.5), (0.8, 0.5), "left of"),
        ((0.8, 0.4), (0.2, 0.5), "right of"),
        ((0.5, 0.2), (0.6, 0.8), "above"),
        ((0.5, 0.8), (0.5, 0.2), "below"),
        ((0.2, 0.2), (0.8, 0.8), None),
    ],
)
def test_relations(
    first: tuple[float, float], second: tuple[float, float], expected: str | None
) -> None:
    assert relation(_thing(*first), _thing(*second)) == expected


def test_a_near_miss_stays_in_the_split_and_differs() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for scene in scenes("train", 60):
        other = near_miss(scene, rng)
        if other is not None:
            found += 1
            assert other.split() == "train"
            assert other.content() != scene.content()
            assert len(other.things) == len(scene.things)
    assert found > 50


def test_mirroring_twice_and_exchanging_twice_give_the_scene_back() -> None:
    scene = scenes("train", 1, kind="pair")[0]
    assert exchanged(exchanged(scene, 0, 1), 0, 1) == scene
    twice = mirrored(mirrored(scene, "x"), "x")
    assert twice.content() == scene.content()
    assert [t.x for t in twice.things] == pytest.approx([t.x for t in scene.things])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 224])
def test_a_thing_is_drawn_in_its_place_and_colour(shape: str, size: int) -> None:
    thing = replace(_thing(0.3, 0.7, "blue", shape), radius=0.18)
    pixels = np.asarray(render(Scene((thing,), GREY, GREY), size)).astype(int)
    assert pixels.shape == (size, size, 3)
    painted = np.abs(pixels - np.array(COLOURS["blue"])).sum(axis=2) < 30
    rows, columns = np.nonzero(painted)
    assert abs(columns.mean() / size - 0.3) < 0.03
    assert abs(rows.mean() / size - 0.7) < 0.05
    assert (np.abs(pixels[0, 0] - 140) <= 1).all()
    hole = bool(painted[round(0.7 * size), round(0.3 * size)])
    assert hole == (shape != "ring")


def test_the_same_scene_gives_the_same_bytes() -> None:
    scene = scene_at("test", 0)
    assert render(scene, 96).tobytes() == render(scene, 96).tobytes()


def test_a_wide_image_holds_the_square_one_in_its_middle() -> None:
    scene = scene_at("test", 3)
    wide, square = render(scene, (640, 480)), render(scene, 480)
    assert wide.size == (640, 480)
    middle = wide.crop((80, 0, 560, 480))
    difference = np.abs(np.asarray(middle).astype(int) - np.asarray(square).astype(int))
    assert difference.max() <= 2


def test_a_larger_drawing_shrunk_is_the_small_drawing() -> None:
    """Images may be drawn at any size: after the model's resize they look the same to it."""
    scene = scene_at("test", 4)
    small = np.asarray(render(scene, 64)).astype(int)
    shrunk = render(scene, 320).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(shrunk).astype(int) - small).mean() < 1.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [200, (300, 200), (180, 240)])
def test_a_box_is_that_of_the_drawn_pixels(shape: str, size: int | tuple[int, int]) -> None:
    for rotation in (-12.0, 0.0, 7.0):
        thing = replace(_thing(0.4, 0.55, shape=shape), rotation_deg=rotation, radius=0.18)
        drawn = np.asarray(render(Scene((thing,), GREY, GREY), size), np.int16)
        rows, columns = np.nonzero(np.abs(drawn - GREY[0]).max(axis=2) > 20)
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array(pixel_box(thing, size)) - edges).max() <= 1.5


def test_the_box_of_a_scene_is_a_share_of_its_square() -> None:
    thing = _thing(0.4, 0.55)
    assert bounding_box(thing) == pytest.approx((0.3, 0.45, 0.5, 0.65))
    assert pixel_box(thing, (300, 200)) == pytest.approx((110, 90, 150, 130))
