"""`mmedge verify`: hashes and golden vectors, with an exit code to build a gate on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, Golden, save_golden
from mmedge.cli import main
from mmedge.files import sha256_file


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["verify", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def shift_golden(bundle: Bundle, by: float) -> None:
    """Move the golden outputs of one variant, and update the manifest."""
    golden = bundle.golden()
    embedding = golden.outputs["text_encoder"]["int8-dynamic"]["embedding"]
    texts = {
        **golden.outputs["text_encoder"],
        "int8-dynamic": {"embedding": embedding + np.float32(by)},
    }
    path = bundle.path / "golden.npz"
    save_golden(path, Golden(golden.inputs, {**golden.outputs, "text_encoder": texts}))
    entry = {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    edit_manifest(bundle.path, "files", "golden.npz", value=entry)


def test_a_good_bundle_passes(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(capsys, str(tiny_bundle.path))
    assert (code, err) == (0, "")
    assert "6 files, every size and sha256 as in the manifest." in out
    assert "replayed with onnxruntime" in out
    assert out.count(" ok ") == 4


def test_outputs_out_of_tolerance_fail_and_are_named(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    shift_golden(tiny_bundle, 0.01)
    code, out, err = verify(capsys, str(tiny_bundle.path))
    assert code == 1
    assert out.count(" ok ") == 3
    assert out.count("OUT OF TOLERANCE") == 1
    assert "out of tolerance here: text_encoder/int8-dynamic." in err


def test_outputs_within_tolerance_pass(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    shift_golden(tiny_bundle, 0.0005)
    assert verify(capsys, str(tiny_bundle.path))[0] == 0


def test_json_holds_the_figures(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    shift_golden(tiny_bundle, 0.01)
    code, out, _ = verify(capsys, str(tiny_bundle.path), "--json")
    assert code == 1
    document = json.loads(out)
    assert document["passed"] is False
    assert [(role["role"], role["variant"], role["passed"]) for role in document["roles"]] == [
        ("image_encoder", "fp32", True),
        ("image_encoder", "int8-dynamic", True),
        ("text_encoder", "fp32", True),
        ("text_encoder", "int8-dynamic", False),
    ]
    failed = document["roles"][-1]
    assert failed["max_abs_error"] == pytest.approx(0.01, rel=1e-3)
    assert failed["tolerance"] == {"cosine_min": 0.9999, "max_abs_error": 0.001}
    assert failed["placement"]["device"] == "cpu"


def test_one_precision_alone(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    shift_golden(tiny_bundle, 0.01)
    code, out, _ = verify(capsys, str(tiny_bundle.path), "--precision", "fp32", "--json")
    assert code == 0
    assert {role["variant"] for role in json.loads(out)["roles"]} == {"fp32"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--precision", "int4", "int4"), ("--device", "cuda:7", "cuda"), ("--device", "tpu", "tpu")],
)
def test_a_missing_backend_is_an_error(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    expected: str,
) -> None:
    code, out, err = verify(capsys, str(tiny_bundle.path), option, value)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert expected in err


def test_a_changed_byte_fails_before_anything_is_run(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Path = tiny_bundle.file("image_encoder/fp32.onnx")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    code, out, err = verify(capsys, str(tiny_bundle.path), "--json")
    assert (code, out) == (1, "")
    assert "'image_encoder/fp32.onnx' has sha256" in err


def test_another_backend_can_be_named(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = verify(capsys, str(tiny_bundle.path), "--backend", "openvino")
    assert (code, err) == (0, "")
    assert "replayed with openvino" in out
    assert out.count(" ok ") == 4
    code, out, err = verify(capsys, str(tiny_bundle.path), "--backend", "abacus")
    assert code == 1
    assert "Unknown backend: got 'abacus', expected one of" in err
