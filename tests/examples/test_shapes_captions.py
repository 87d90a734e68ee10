"""Captions are true: parsed and compared with the scene."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from captions import brief_caption, caption, label_prompt, relational_caption
from drawing import pixel_box
from generate import captioned, main
from PIL import Image
from world import COLOURS, LABELS, SHAPES, Scene, Thing, mirrored, relation, scenes

from mmedge.converters.data.datasets import read_dataset

_SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
_COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
_NAME = re.compile(
    rf"\b(?P<count>{'|'.join(_COUNTS)}) (?:(?P<size>{'|'.join(_SIZES)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?P<plural>e?s)?\b"
)
_RELATION = re.compile(
    r"^,?(?: (?:to the )?(?P<side>left|right) of| (?P<level>above|over|below|under)) $"
)
_RELATION_IT = re.compile(r"^ (?:to the )?(left of|right of|above|over|below|under) it")
_ROW = re.compile(r"\b(top|upper|bottom|lower)\b")
_COLUMN = re.compile(r"\b(left|right)\b(?! of)")


def _mentions(text: str) -> list[tuple[re.Match[str], str]]:
    """Every named thing with the words between it and the next one."""
    found = list(_NAME.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(match, text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def _meant(match: re.Match[str], scene: Scene) -> list[Thing]:
    return [
        thing
        for thing in scene.things
        if thing.colour == match["colour"]
        and thing.shape == match["shape"]
        and (match["size"] is None or thing.size == _SIZES[match["size"]])
    ]


def _relation_word(words: str) -> str | None:
    match = _RELATION.match(words)
    if match is None:
        return None
    if match["side"]:
        return f"{match['side']} of"
    return {"over": "above", "under": "below"}.get(match["level"], match["level"])


def _assert_true(text: str, scene: Scene) -> None:
    mentions = _mentions(text)
    assert mentions, text
    for index, (match, after) in enumerate(mentions):
        things = _meant(match, scene)
        assert len(things) == _COUNTS[match["count"]], text
        row, column = _ROW.search(after), _COLUMN.search(after)
        if row:
            message = "top" if row[1] in ("top", "upper") else "bottom"
            assert {t.zone[0] for t in things} == {message}, text
        if column:
            assert {t.zone[1] for t in things} == {column[1]}, text
        # Behind a place, a relation follows a comma: "at the top, left of a red star".
        between = _relation_word(after) or _relation_word("," + after.rpartition(",")[2])
        if between:
            others = _meant(mentions[index + 1][0], scene)
            assert {relation(a, b) for a in things for b in others} == {between}, text
        it = _RELATION_IT.match(after)
        if it:
            message = {"over": "above", "under": "below"}.get(it[1], it[1])
            first = _meant(mentions[0][0], scene)
            assert {relation(a, b) for a in things for b in first} == {message}, text


def test_captions_are_true_and_name_everything_with_its_size() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes("train", 400):
        text = caption(scene, rng)
        _assert_true(text, scene)
        named: Counter[tuple[str, str, str]] = Counter()
        for match, _ in _mentions(text):
            assert match["size"] is not None, text
            kind = (_SIZES[match["size"]], match["colour"], match["shape"])
            named[kind] += _COUNTS[match["count"]]
        assert named == Counter(thing.kind for thing in scene.things), text


def test_brief_captions_are_true() -> None:
    rng = np.random.default_rng(1)
    for scene in scenes("train", 200):
        for match, _ in _mentions(brief_caption(scene, rng)):
            assert len(_meant(match, scene)) == _COUNTS[match["count"]]


def test_the_check_itself_fails_on_wrong_names() -> None:
    """Captions of pairs, held against the scene turned around: half or more must be caught."""
    rng = np.random.default_rng(2)
    caught = 0
    pairs = scenes("train", 60, kind="pair")
    for scene in pairs:
        turned = mirrored(mirrored(scene, "x"), "y")
        try:
            _assert_true(caption(scene, rng), turned)
        except AssertionError:
            caught += 1
    assert caught > 45


def test_captions_come_in_many_wordings() -> None:
    scene = scenes("train", 1, kind="pair")[0]
    rng = np.random.default_rng(3)
    assert len({caption(scene, rng) for _ in range(60)}) > 30


def test_the_five_hundred_test_captions_are_distinct_and_reproducible() -> None:
    pairs = captioned("test", 500)
    assert len({text for _, text in pairs}) == 500
    assert pairs == captioned("test", 500)


def test_relational_captions_are_true_and_need_a_clear_pair() -> None:
    for scene in scenes("test", 80, kind="pair"):
        if relation(*scene.things) is not None:
            _assert_true(relational_caption(scene), scene)
    with pytest.raises(ValueError, match="two things"):
        relational_caption(scenes("test", 1, kind="trio")[0])


def test_prompts_carry_the_right_article() -> None:
    assert label_prompt("orange star", "a {label}") == "an orange star"
    assert label_prompt("red star") == "a photo of a red star"
    assert label_prompt("orange star") == "a photo of an orange star"
    assert len({label_prompt(label) for label in LABELS}) == len(LABELS)


def test_generate_writes_images_and_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gallery"
    main(["--split", "test", "--count", "12", "--out", str(out), "--size", "96x72"])
    assert "12 images" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    pairs = captioned("test", 12)
    for line, (scene, text) in zip(lines, pairs, strict=True):
        assert set(line) == {"image", "caption", "label"}
        assert line["caption"] == text
        assert line["label"] == scene.label
        with Image.open(out / line["image"]) as image:
            assert (image.size, image.mode, image.format) == ((96, 72), "RGB", "PNG")
    boxed = read_dataset(out / "annotations.json")
    assert boxed.categories == LABELS
    for sample, (scene, _) in zip(boxed.samples, pairs, strict=True):
        assert sample.objects is not None
        assert sample.objects.size == (96, 72)
        assert sample.objects.labels == tuple(thing.label for thing in scene.things)
        expected = [pixel_box(thing, (96, 72)) for thing in scene.things]
        assert np.abs(np.array(sample.objects.boxes) - expected).max() < 0.01


@pytest.mark.parametrize("size", ["big", "12", "640x", "5000"])
def test_generate_refuses_a_size_that_is_none(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "gallery"), "--size", size])
    assert size in capsys.readouterr().err
    assert not (tmp_path / "gallery").exists()
