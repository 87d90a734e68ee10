"""Heads from the command line: from a folder, as one graph, inside their encoder's bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import run
from toy_heads import LABELS, SONAR, toy_spec

import mmedge
from mmedge.bundle import open_bundle, verify_files
from mmedge.bundle.joining import add_head
from mmedge.bundle.kinds import DualEncoderKind, FusedKind
from mmedge.converters import ConvertConfig, fuse_head
from mmedge.errors import BundleError, ConversionError, SourceError, SpaceMismatchError
from mmedge.files.safetensors_file import write_safetensors
from mmedge.models import DualEncoder
from mmedge.models.heads import Stamped
from mmedge.models.module import Module

FRAME = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
HEARD = np.linspace(0, 1, SONAR, dtype=np.float32)
TEXT = "a blue circle"
GIVEN: dict[str, Any] = {
    "inputs": {
        "patches": {"modality": "image", "tap": "patches", "max_skew_ms": 100},
        "words": {"modality": "text", "tap": "tokens", "missing": "default"},
        "sonar": {"missing": "marginalize", "max_skew_ms": 50},
    },
    "present": "present",
    "defaults": "learned.safetensors",
    "labels": list(LABELS),
    "meanings": {"map": "alignment"},
}


@pytest.fixture(scope="module")
def folder(toy_head_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's head: an ONNX file, its learned default and head.json."""
    made = tmp_path_factory.mktemp("user") / "their-head"
    made.mkdir()
    bundle = open_bundle(toy_head_bundle)
    model = onnx.load(bundle.model_path(bundle.variant("toy"), layouts=("portable",)))
    onnx.save(model, made / "head.onnx")
    default = toy_spec(Path()).inputs["words"].default
    assert default is not None
    write_safetensors(made / "learned.safetensors", {"words": default})
    (made / "head.json").write_text(json.dumps(GIVEN))
    return made


@pytest.fixture(scope="module")
def clip(tapped_bundle: Path) -> Iterator[DualEncoder]:
    with DualEncoder.load(tapped_bundle, precision="fp32") as model:
        yield model


def test_a_head_in_a_folder_becomes_a_bundle(
    folder: Path,
    tapped_bundle: Path,
    toy_head_bundle: Path,
    clip: DualEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "their-head.mmedge"
    run(capsys, "convert", folder, "--on", tapped_bundle, "-o", out)
    bundle = open_bundle(out)
    assert [variant.name for variant in bundle.role("their_head").variants] == ["fp32"]
    assert isinstance(bundle.manifest.kind, FusedKind)
    features = clip.extract(FRAME, time=0.0)
    with (
        mmedge.load_head(out, on=clip) as theirs,
        mmedge.load_head(toy_head_bundle, on=clip) as ours,
    ):
        for given in ((features,), (features, TEXT), (features, {"sonar": Stamped(HEARD, 0.0)})):
            np.testing.assert_allclose(theirs(*given).scores, ours(*given).scores, atol=1e-5)
    assert "reads patches" in run(capsys, "inspect", out)


def test_one_graph_equals_separate_sessions_bit_for_bit(
    folder: Path,
    tapped_bundle: Path,
    toy_head_bundle: Path,
    clip: DualEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "one.mmedge"
    run(capsys, "convert", folder, "--on", tapped_bundle, "--fuse", "-o", out, "-q")
    features = clip.extract(FRAME, time=0.0)
    with (
        Module.load(out) as fused,
        mmedge.load_head(toy_head_bundle, on=clip) as head,
    ):
        assert {spec.name for spec in fused.session.inputs} == {
            "pixel_values", "input_ids", "sonar", "present",
        }  # fmt: skip
        for text in (TEXT, "a"):
            apart = head(features, text, {"sonar": Stamped(HEARD, 0.0)})
            made = fused(
                {
                    "image": [FRAME],
                    "text": [text],
                    "sonar": HEARD[None],
                    "present": np.array([[True]]),
                }
            )
            for name, array in apart.outputs.items():
                np.testing.assert_array_equal(made[name], array)
    verify_files(open_bundle(out))
    assert all(result.passed for result in mmedge.verify_bundle(open_bundle(out)))


def test_a_head_moves_into_its_encoders_bundle(
    tapped_bundle: Path,
    toy_head_bundle: Path,
    clip: DualEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "robot.mmedge"
    assert "toy" in run(capsys, "heads", "add", tapped_bundle, toy_head_bundle, "-o", out)
    bundle = open_bundle(out)
    verify_files(bundle)
    assert {(each.role, each.passed) for each in mmedge.verify_bundle(bundle)} == {
        (role, True) for role in ("image_encoder", "text_encoder", "toy")
    }
    assert isinstance(bundle.manifest.kind, DualEncoderKind)
    features = clip.extract(FRAME, time=0.0)
    with (
        DualEncoder.load(out, precision={"image_encoder": "fp32", "text_encoder": "fp32"}) as robot,
        mmedge.load_head(toy_head_bundle, on=clip) as head,
    ):
        assert list(robot.heads) == ["toy"]
        inside = robot.heads["toy"](robot.extract(FRAME, time=0.0), TEXT)
        np.testing.assert_array_equal(inside.scores, head(features, TEXT).scores)
        assert robot.spaces.keys() == {"image_encoder", "text_encoder"}
        np.testing.assert_array_equal(
            robot.classify(FRAME, ["red"]).probabilities,
            clip.classify(FRAME, ["red"]).probabilities,
        )
    with DualEncoder.load(out, roles=["image_encoder", "toy"]) as half:
        assert half.encode_image(FRAME).shape == (1, 16)
        assert list(half.runs) == ["embed"]
    asked = ("--seconds", "0.01", "--min-runs", "2", "--warmup", "0", "--cold-starts", "0")
    shown = run(capsys, "profile", out, *asked, "--precision", "fp32", "--json", "-", "-q")
    cells = json.loads(shown)["cells"]
    assert {cell["role"] for cell in cells} == {"image_encoder", "text_encoder", "toy"}
    with pytest.raises(BundleError, match="has a role 'toy' already"):
        add_head(out, toy_head_bundle, tmp_path / "again.mmedge")
    with pytest.raises(BundleError, match="expected encoders and a fused head"):
        add_head(toy_head_bundle, tapped_bundle, tmp_path / "round.mmedge")


def test_a_head_of_another_encoder_is_not_joined(
    tiny_bundle: Any, toy_head_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpaceMismatchError, match="input 'patches' reads 'patches' of clip-"):
        add_head(tiny_bundle.path, toy_head_bundle, tmp_path / "x.mmedge")
    with pytest.raises(SpaceMismatchError, match="reads 'patches' of clip-"):
        fuse_head(toy_head_bundle, tiny_bundle.path, ConvertConfig("x", tmp_path / "x.mmedge"))
    with pytest.raises(ConversionError, match="is a dual_encoder bundle, no head"):
        fuse_head(tiny_bundle.path, tiny_bundle.path, ConvertConfig("x", tmp_path / "x.mmedge"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {}}, r"head\.json: inputs: "),
        ({"inputs": {"patches": {"tap": "patches", "skew": 3}}}, r"inputs\.patches\.skew"),
        ({"graph": "../head.onnx"}, r"head\.json: graph"),
        ({"graph": "other.onnx"}, r"names other\.onnx, which is not there"),
        ({"defaults": "none.safetensors"}, r"none\.safetensors"),
        ({"inputs": {"patches": {}}}, r"'words' is no input of head\.json"),
    ],
)
def test_a_head_json_that_is_wrong(
    change: dict[str, Any],
    message: str,
    folder: Path,
    tapped_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mmedge.converters.head_folders import convert_head_folder

    wrong = shutil.copytree(folder, tmp_path / "wrong")
    (wrong / "head.json").write_text(json.dumps(GIVEN | change))
    with pytest.raises(SourceError, match=message):
        convert_head_folder(ConvertConfig(str(wrong), tmp_path / "x.mmedge"), [tapped_bundle])


def test_a_head_needs_its_encoder_and_others_do_not(
    folder: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.mmedge"
    said = run(capsys, "convert", folder, "-o", out, code=1)
    assert "is a head. Name the bundle" in " ".join(said.split())
    said = run(capsys, "convert", clip_folder, "--on", folder, "-o", out, code=1)
    assert "--on and --fuse are for heads" in " ".join(said.split())
