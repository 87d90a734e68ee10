"""`mmedge run`: what each kind of model does with files and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from converted import write_images, write_sounds

import mmedge
from mmedge.bundle import Bundle
from mmedge.cli.run import _write
from mmedge.models.generator import Generator
from mmedge.models.running import Made


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    return commands.run(capsys, "run", *arguments, code=code)


def results(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *arguments, "--json"))
    return found


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return sorted(write_images(tmp_path / "images", 2, 3).iterdir())


def test_images_are_classified_by_texts(
    tiny_bundle: Bundle, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a red circle", "a blue star", "a ring"]
    asked = [part for each in images for part in ("--image", each)]
    asked += [part for each in texts for part in ("--text", each)]
    output = tmp_path / "made.npz"
    found = results(capsys, tiny_bundle.path, *asked, "-k", 2, "-o", output)
    assert found["task"] == "classify"
    assert [row["input"] for row in found["results"]] == [
        str(each) for each in images for _ in "ab"
    ]
    with mmedge.load(tiny_bundle.path) as model:
        expected = model.classify(images, texts, template="{}")
    best = [label.label for row in expected.top(2) for label in row]
    assert [row["label"] for row in found["results"]] == best
    with np.load(output) as file:
        assert np.allclose(file["probabilities"], expected.probabilities, atol=1e-6)
    shown = run(capsys, tiny_bundle.path, *asked)
    assert shown.count("a blue star") == 2


def test_given_inputs_are_embedded(
    tiny_bundle: Bundle, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--image", images[0], "--text", "a ring", "--task", "embed")
    found = results(capsys, tiny_bundle.path, *asked)
    with mmedge.load(tiny_bundle.path) as model:
        expected = [*model.encode_image(images[:1]), *model.encode_text(["a ring"])]
    assert np.allclose([row["embedding"] for row in found["results"]], expected, atol=1e-6)
    assert f"{expected[1][0]:.4f}, " in run(capsys, tiny_bundle.path, "--text", "a ring")


def test_sounds_are_embedded(
    clap_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = write_sounds(tmp_path / "sounds", 1, 1).parent / "000.wav"
    (row,) = results(capsys, clap_bundle, "--audio", sound)["results"]
    with mmedge.load(clap_bundle) as model:
        assert np.allclose(row["embedding"], model.encode_audio(sound)[0], atol=1e-6)


def test_a_checkpoint_with_classes_names_them(
    vit_bundle: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(capsys, vit_bundle, "--image", images[0], "-k", 1)
    with mmedge.load(vit_bundle) as model:
        ((best,),) = model.classify(images[0]).top(1)
    assert found["task"] == "classify"
    assert [row["label"] for row in found["results"]] == [best.label]
    assert results(capsys, vit_bundle, "--image", images[0], "--task", "embed")["task"] == "embed"


def test_objects_are_detected(
    owlvit_bundle: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [part for each in images for part in ("--image", each)]
    asked += ["--text", "a circle", "--text", "a star", "--threshold", 0.0]
    found = results(capsys, owlvit_bundle, *asked, "-o", tmp_path / "made.npz")
    with mmedge.load(owlvit_bundle) as model:
        expected = model.detect(images, ["a circle", "a star"], threshold=0.0)
    assert found["task"] == "detect"
    labels = [str(label) for one in expected for label in one.labels]
    assert len(labels) > 0
    assert [row["label"] for row in found["results"]] == labels
    boxes = np.concatenate([one.boxes for one in expected])
    sides = [[row[side] for side in ("left", "top", "right", "bottom")] for row in found["results"]]
    assert np.allclose(sides, boxes, atol=1e-3)
    with np.load(tmp_path / "made.npz") as made:
        assert made["image"].tolist() == [n for n, one in enumerate(expected) for _ in one.scores]
    none = results(capsys, owlvit_bundle, *asked[:-1], 1.0)
    assert none["results"] == []


def test_a_text_is_continued(gpt2_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--text", "a red", "--max-new-tokens", 3)
    (row,) = results(capsys, gpt2_bundle, *asked)["results"]
    with Generator.load(gpt2_bundle) as model:
        made = model.complete("a red", max_new_tokens=3)
    assert row == {
        "input": "a red", "text": made.text, "finish": made.finish, "tokens": list(made.tokens)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b", "../a"])
def test_any_name_of_an_output_can_be_written(name: str, tmp_path: Path) -> None:
    made = Made([], {name: np.arange(3)})
    _write(tmp_path / "made.npz", made)
    assert [each.name for each in tmp_path.iterdir()] == ["made.npz"]
    with np.load(tmp_path / "made.npz") as file:
        assert file[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got nothing; classify takes images and texts; embed takes images or texts"),
        (["--text", "x", "--audio", "x.wav"], "got audio, texts"),
        (["--text", "x", "--task", "detect"], "not one of this model's: classify, embed"),
        (["--text", "x", "--task", "classify"], "got texts; classify takes images and texts"),
        (["--image", "gone.png"], "gone.png"),
        (["--feed", "gone.npz"], "gone.npz"),
        (["--text", "x", "-o", "x.txt"], "ending in .npz"),
    ],
)
def test_mistakes_are_one_message(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code = 2 if "x.txt" in arguments else 1
    err = run(capsys, tiny_bundle.path, *arguments, code=code)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
