"""Valid manifests, and the errors of invalid ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import DIM, edit_manifest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmedge.bundle import Bundle, open_bundle
from mmedge.bundle.manifest import FORMAT_VERSION
from mmedge.bundle.paths import check_relative_path
from mmedge.bundle.reading import MAX_MANIFEST_BYTES, parse_manifest
from mmedge.bundle.schema import manifest_schema
from mmedge.bundle.tensors import StateEntry, TensorEntry
from mmedge.errors import ManifestError
from mmedge.specs import State, StateTensor, TensorSpec

IMAGE = ("roles", "image_encoder")
VARIANT = (*IMAGE, "variants", 0)


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        open_bundle(path)
    message = str(caught.value)
    assert str(path / "manifest.json") in message
    assert len(message.splitlines()) <= 6
    return message


def test_a_manifest_survives_writing_and_reading(tiny_bundle: Bundle) -> None:
    data = (tiny_bundle.path / "manifest.json").read_bytes()
    assert parse_manifest(data, Path("x")) == tiny_bundle.manifest
    assert data.endswith(b"}\n")
    assert list(json.loads(data))[:3] == ["format_version", "name", "family"]


# Where in the manifest, what is put there, and what the message must say about it.
FAULTS: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "unknown field at the top": (("turbo",), True, "turbo: unknown field"),
    "unknown field below": (
        (*VARIANT, "tolerance", "slack"),
        1,
        "roles.image_encoder.variants.0.tolerance.slack: unknown field",
    ),
    "number as text": ((*VARIANT, "opset"), "20", "roles.image_encoder.variants.0.opset: "),
    "truth as number": ((*VARIANT, "opset"), True, "roles.image_encoder.variants.0.opset: "),
    "unknown precision": ((*VARIANT, "precision"), "int3", "variants.0.precision: "),
    "no roles": (("roles",), {}, "roles: "),
    "role name": (("roles", "Image/Encoder"), {}, "roles.Image/Encoder"),
    "no variants": ((*IMAGE, "variants"), [], "roles.image_encoder.variants: "),
    "unknown dtype": ((*IMAGE, "inputs", 0, "dtype"), "float31", "unknown dtype 'float31'"),
    "object dtype": ((*IMAGE, "inputs", 0, "dtype"), "object", "unknown dtype 'object'"),
    "zero axis": ((*IMAGE, "inputs", 0, "shape"), ["batch", 0], "inputs.0.shape.1"),
    "unnamed axis": ((*IMAGE, "inputs", 0, "shape"), ["", 3], "inputs.0.shape.0"),
    "size": (
        (*VARIANT, "size_bytes"),
        1,
        "variant image_encoder/fp32: size_bytes is 1, its files sum to ",
    ),
    "file not listed": (
        (*VARIANT, "files"),
        ["image_encoder/fp32.onnx", "gone.data"],
        "file of variant image_encoder/fp32 'gone.data' is not listed in files",
    ),
    "model not among the files": (
        (*VARIANT, "models"),
        {"portable": "text_encoder/fp32.onnx"},
        "model 'text_encoder/fp32.onnx' of layout 'portable' is not in the variant's files",
    ),
    "unknown layout": ((*VARIANT, "models"), {"tensorrt": "x"}, "variants.0.models.tensorrt"),
    "variant twice": ((*IMAGE, "variants", 1, "name"), "fp32", "variant 'fp32' appears more"),
    "golden not listed": (("golden",), "g.npz", "golden 'g.npz' is not listed in files"),
    "tokenizer not listed": (
        ("processors", "text", "tokenizer_file"),
        "../tokenizer.json",
        "file of processor 'text' '../tokenizer.json' is not listed in files",
    ),
    "input that no role takes": (
        ("processors", "image", "input"),
        "pixels",
        "input 'pixel_values' is fed by 'image', which makes ['pixels']",
    ),
    "processor that is not there": (
        (*IMAGE, "inputs", 0, "feed"),
        {"processor": "camera"},
        "names the processor 'camera', which does not exist",
    ),
    "feed of two kinds": (
        (*IMAGE, "inputs", 0, "feed"),
        {"processor": "image", "state": True},
        "inputs.0.feed",
    ),
    "output of a role that is not there": (
        (*IMAGE, "inputs", 0, "feed"),
        {"role": "audio_encoder", "output": "hidden"},
        "names the output audio_encoder/hidden, which does not exist",
    ),
    "state without its inputs": (
        (*IMAGE, "state"),
        {"tensors": [{"input": "past", "output": "embedding", "update": "replace"}]},
        "inputs fed by the state are [], unlike state.tensors",
    ),
    "axis out of order": ((*IMAGE, "axes", "batch", "opt"), 99, "axes.batch"),
    "default that is not there": ((*IMAGE, "default"), "int3", "default 'int3' is not among"),
    "unknown kind": (("kind", "type"), "oracle", "kind: "),
    "role that the kind does not use": (
        ("kind", "encoders"),
        {"image": "image_encoder"},
        "role 'text_encoder' is not one that kind 'dual_encoder' uses",
    ),
    "role that is not there": (
        ("kind", "encoders", "audio"),
        "audio_encoder",
        "kind 'dual_encoder' names the role 'audio_encoder', not in roles",
    ),
    "encoder of another modality": (
        ("kind", "encoders"),
        {"image": "text_encoder", "text": "image_encoder"},
        "text_encoder is the image encoder, and takes text",
    ),
    "embedding of another size": (("kind", "embedding_dim"), 5, "expected embeddings (batch, 5)"),
    "logit scale": (("kind", "contrastive_head", "logit_scale"), 1e308, "logit_scale"),
    "axis of 2**70": ((*IMAGE, "inputs", 0, "shape"), ["batch", 2**70], "inputs.0.shape.1"),
    "classification without a head": (
        ("kind", "contrastive_head"),
        None,
        "needs a contrastive_head",
    ),
    "manifest lists itself": (
        ("files", "manifest.json"),
        {"size_bytes": 1, "sha256": "0" * 64},
        "cannot hold its own hash",
    ),
    "sha256": (("files", "golden.npz", "sha256"), "0" * 63, "files.golden.npz.sha256"),
    "negative size": (("files", "golden.npz", "size_bytes"), -1, "files.golden.npz.size_bytes"),
    "tolerance beyond a cosine": ((*VARIANT, "tolerance", "cosine_min"), 1.5, "cosine_min"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradiction_is_refused_by_its_place(tiny_bundle: Bundle, fault: str) -> None:
    steps, value, expected = FAULTS[fault]
    edit_manifest(tiny_bundle.path, *steps, value=value)
    assert expected in refusal(tiny_bundle.path)


def test_only_the_first_faults_are_named(tiny_bundle: Bundle) -> None:
    for index in range(20):
        edit_manifest(tiny_bundle.path, f"field{index}", value=0)
    message = refusal(tiny_bundle.path)
    assert message.count("unknown field") == 3
    assert message.endswith("and 17 more")


ENCODER = {"type": "encoder", "encoders": {"image": "image_encoder"}, "embedding_dim": DIM}


@pytest.mark.parametrize(
    ("tasks", "changes", "expected"),
    [
        (["image-classification"], {}, "image classification and a class_head need each other"),
        ([], {"class_head": {"labels": ["a"]}}, "and a class_head need each other"),
        (
            ["image-classification"],
            {"class_head": {"labels": ["a", "b"]}},
            "a class_head of 2 labels needs an image encoder whose second output is ('batch', 2)",
        ),
        ([], {"class_head": {"labels": []}}, "kind.encoder.class_head.labels"),
        ([], {"class_head": {"labels": ["a", ""]}}, "kind.encoder.class_head.labels.1"),
        ([], {"encoders": {"image": "image_encoder", "text": "text_encoder"}}, "encoders"),
        ([], {"embedding_dim": 5}, "expected embeddings (batch, 5)"),
    ],
)
def test_an_encoder_whose_parts_contradict_is_refused(
    tiny_bundle: Bundle, tasks: list[str], changes: dict[str, object], expected: str
) -> None:
    manifest = json.loads((tiny_bundle.path / "manifest.json").read_text())
    manifest["tasks"], manifest["kind"] = tasks, {**ENCODER, **changes}
    del manifest["roles"]["text_encoder"], manifest["processors"]["text"]
    (tiny_bundle.path / "manifest.json").write_text(json.dumps(manifest))
    assert expected in refusal(tiny_bundle.path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../outside",
        "a/../../outside",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "C:/a",
        "c:a",
        "a\nb",
        "a\x00b",
        "a\x1b[31m",
        "a" * 256,
        "a/" * 600 + "a",
    ],
)
def test_a_path_that_could_leave_the_bundle_is_refused(tiny_bundle: Bundle, path: str) -> None:
    with pytest.raises(ValueError, match="expected a relative POSIX path"):
        check_relative_path(path)
    edit_manifest(tiny_bundle.path, "golden", value=path)
    assert "golden: path" in refusal(tiny_bundle.path)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_an_accepted_path_stays_below_its_root(path: str) -> None:
    pattern = json.loads(manifest_schema())["properties"]["golden"]["pattern"]
    try:
        check_relative_path(path)
    except ValueError:
        return
    assert re.fullmatch(pattern, path)
    root = Path("/bundle")
    assert (root / path).as_posix() == f"/bundle/{path}"
    assert ".." not in Path(path).parts


@pytest.mark.parametrize("version", ["3.0", "3.17", "10.0"])
def test_a_newer_major_is_refused_by_its_version_before_anything_else(
    tiny_bundle: Bundle, version: str
) -> None:
    manifest = tiny_bundle.path / "manifest.json"
    manifest.write_text(json.dumps({"format_version": version, "all": "different"}))
    message = refusal(tiny_bundle.path)
    assert f"format version {version}" in message
    assert FORMAT_VERSION in message
    assert "Upgrade mmedge" in message
    assert "unknown field" not in message


def test_a_newer_minor_is_read_while_it_uses_nothing_new(tiny_bundle: Bundle) -> None:
    edit_manifest(tiny_bundle.path, "format_version", value="2.7")
    assert open_bundle(tiny_bundle.path).manifest.format_version == "2.7"


def test_a_newer_minor_with_something_new_asks_for_an_upgrade(tiny_bundle: Bundle) -> None:
    edit_manifest(tiny_bundle.path, "format_version", value="2.7")
    edit_manifest(tiny_bundle.path, "turbo", value=True)
    message = refusal(tiny_bundle.path)
    assert "format version 2.7" in message
    assert "Upgrade mmedge" in message
    assert "turbo: unknown field" in message


def test_an_older_major_asks_for_a_new_conversion(tiny_bundle: Bundle) -> None:
    edit_manifest(tiny_bundle.path, "format_version", value="1.0")
    assert "Convert the model again" in refusal(tiny_bundle.path)


@pytest.mark.parametrize("version", [None, 1, 1.0, "1", "one", "1.0.0", "-1.0", [], "1.0\n"])
def test_a_version_that_is_none_is_refused(tiny_bundle: Bundle, version: Any) -> None:
    edit_manifest(tiny_bundle.path, "format_version", value=version)
    assert "got format_version" in refusal(tiny_bundle.path)


BROKEN = {
    "empty": (b"", "not JSON"),
    "truncated": (b'{"format_version": "1.0", "na', "not JSON"),
    "not UTF-8": (b'{"format_version": "1.0", "name": "\xff"}', "not UTF-8 (byte 35)"),
    "UTF-16": ('{"format_version": "1.0"}'.encode("utf-16"), "not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "list": (b"[]", "no JSON object"),
    "number": (b"1", "no JSON object"),
    "repeated key": (b'{"format_version": "1.0", "format_version": "2.0"}', "appears twice"),
    "repeated key below": (b'{"files": {"a": 1, "a": 2}}', "the key 'a' appears twice"),
    "NaN": (b'{"format_version": "1.0", "x": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"format_version": "1.0", "x": -Infinity}', "-Infinity is not a JSON number"),
    "overflow": (b'{"format_version": "1.0", "x": 1e999}', "1e999 is beyond the range"),
    "depth": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested deeper than 64 levels"),
    "digits": (b'{"x": ' + b"1" * 10_000 + b"}", "a number of 10000 digits"),
    "lone surrogate": (b'{"format_version": "2.0", "name": "\\ud800"}', "not a valid manifest"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_other_json_is_no_manifest(tiny_bundle: Bundle, kind: str) -> None:
    data, expected = BROKEN[kind]
    (tiny_bundle.path / "manifest.json").write_bytes(data)
    assert expected in refusal(tiny_bundle.path)


def test_a_huge_manifest_is_not_read(tiny_bundle: Bundle) -> None:
    with (tiny_bundle.path / "manifest.json").open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert "expected at most 65536 KiB" in refusal(tiny_bundle.path)


@given(
    st.builds(
        TensorSpec,
        st.text(min_size=1, max_size=5),
        st.sampled_from([np.dtype(kind) for kind in "?bBhHiIlLefd"]),
        st.lists(st.integers(1, 99) | st.sampled_from(["batch", "8"]), max_size=4).map(tuple),
    )
)
def test_a_tensor_spec_survives_the_manifest(spec: TensorSpec) -> None:
    entry = TensorEntry(name=spec.name, dtype=spec.dtype.name, shape=spec.shape)
    assert TensorEntry.model_validate_json(entry.model_dump_json(), strict=True).spec() == spec


def test_the_published_schema_is_the_models() -> None:
    published = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
    assert published.read_text(encoding="utf-8") == manifest_schema(), (
        "run: python -m mmedge.bundle.schema > docs/manifest.schema.json"
    )


def test_a_state_survives_json() -> None:
    state = State(
        (
            StateTensor("past", "present", "append", 1),
            StateTensor("buffer", "written", "in_place", 2),
            StateTensor("hidden", "after", "replace"),
            StateTensor("memory", None, "constant", source=("encoder", "hidden")),
        ),
        length="past",
        capacity=64,
        batch="rows",
        new="tokens",
    )
    entry = StateEntry.of(state)
    assert StateEntry.model_validate_json(entry.model_dump_json()).state() == state


@pytest.mark.parametrize(
    "tensor",
    [
        {"input": "past", "output": "present", "update": "append"},
        {"input": "past", "update": "append", "axis": 1},
        {"input": "hidden", "output": "after", "update": "replace", "axis": 1},
        {"input": "memory", "output": "again", "update": "constant"},
    ],
)
def test_a_state_that_cannot_be_is_refused(tensor: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"axis goes with|output goes with"):
        StateEntry.model_validate({"tensors": [tensor]})
