"""`mmedge inspect`: for people in a terminal, for grep in a pipe, for machines as JSON."""

from __future__ import annotations

import json
import re

import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, Manifest
from mmedge.cli import main

PIXELS = "pixel_values float32(batch, 3, 8, 8)"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["inspect", *arguments])
    captured = capsys.readouterr()
    assert done.value.code == 0, captured.err
    assert captured.err == ""
    return captured.out


def test_everything_a_person_asks_about_is_there(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, str(tiny_bundle.path))
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    for expected in (
        f"bundle tiny ({tiny_bundle.path})",
        "family clip",
        "tasks retrieval, zero-shot-classification",
        "embedding 4 dimensions",
        "scores softmax(20 * cosine)",
        "labels colours (3)",
        f"image_encoder {PIXELS} -> embedding float32(batch, 4); default fp32",
        "fp32 fp32 370 B 20",
        "int8-dynamic int8 370 B 20",
        "fp32 portable: -",
        "int8-dynamic portable: method rounded, step 0.015625",
        "fp32 1.0e-07 1.000000 1.000000 16",
        "image_encoder int8-dynamic",
        "cosine-mean 0.9999 .9998\N{EN DASH}1",
        "cosine-p1 0.9998 .9997\N{EN DASH}.9999",
        "top-10 overlap 0.980 .970\N{EN DASH}.990",
        "text→image@1 0.750 .700\N{EN DASH}.800",
        "loss against fp32",
        "text→image@1 0.010 -.005\N{EN DASH}.020",
        "Quality with 95 % intervals, measured on drawn at random (n = 100)",
        "text -> input_ids tokenizer.json, at most 6 tokens, padded to the longest with id 0",
        "source tests/bundles.py",
        "command mmedge convert tiny -o tiny.mmedge",
    ):
        assert expected in lines
    (space,) = [line for line in lines if line.startswith("tiny-0001 ")]
    assert space.count("/") == 4
    assert "\x1b" not in text


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_narrow_terminal_folds_and_loses_nothing(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed(capsys, str(tiny_bundle.path))
    assert max(map(len, text.splitlines())) <= columns
    if columns >= 80:
        assert "…" not in text
        assert "int8-dynamic" in text


def test_a_recipe_is_described_once_for_both_roles(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "method": "StaticInt8",
        "bias_correction": True,
        "equalization": {"strength": None},
        "half": False,
        "keep": ["layers.0.fc1", "layers.1.fc1"],
    }
    for role in ("image_encoder", "text_encoder"):
        edit_manifest(tiny_bundle.path, "roles", role, "variants", 1, "recipe", value=recipe)
    lines = [" ".join(line.split()) for line in printed(capsys, str(tiny_bundle.path)).splitlines()]
    message = "method StaticInt8, bias correction, equalization, keep layers.0.fc1, layers.1.fc1"
    assert lines.count(f"int8-dynamic portable: {message}") == 1
    edit_manifest(tiny_bundle.path, "roles", "text_encoder", "variants", 1, "recipe", value={})
    text = printed(capsys, str(tiny_bundle.path))
    assert "image_encoder/int8-dynamic" in text
    assert "text_encoder/int8-dynamic" in text


def test_json_is_the_manifest_and_nothing_else(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(printed(capsys, str(tiny_bundle.path), "--json"))
    assert document["path"] == str(tiny_bundle.path)
    assert document["size_bytes"] == sum(
        entry.size_bytes for entry in tiny_bundle.manifest.files.values()
    )
    again = Manifest.model_validate_json(json.dumps(document["manifest"]), strict=True)
    assert again == tiny_bundle.manifest


def test_a_manifest_cannot_steer_the_terminal_or_the_markup(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(tiny_bundle.path, "name", value="\x1b]0;owned\x07[red]x[/red] :smile:")
    text = printed(capsys, str(tiny_bundle.path))
    assert "\\x1b]0;owned\\x07[red]x[/red] :smile:" in text
    assert "\x1b" not in text


def test_a_bundle_without_fidelity_figures_shows_no_empty_tables(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("image_encoder", "text_encoder"):
        for index in (0, 1):
            for field in ("parity", "quality", "space"):
                steps = ("roles", role, "variants", index, field)
                edit_manifest(tiny_bundle.path, *steps, value=None)
    text = printed(capsys, str(tiny_bundle.path))
    for title in ("Parity", "Quality", "Embedding spaces"):
        assert title not in text
