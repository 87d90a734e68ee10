"""Bundles that cannot encode: verify refuses each, and names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from bundles import edit_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmedge
from mmedge.bundle import Bundle, describe_files, open_bundle, verify_files
from mmedge.errors import ManifestError, MmedgeError
from mmedge.models import verify_bundle

Change: TypeAlias = Callable[[Path], object]

IMAGE, TEXT = ("processors", "image"), ("processors", "text")
KIND, HEAD = ("kind",), ("kind", "contrastive_head")
ROLES = ("roles",)


def setting(*steps: str | int, value: object) -> Change:
    return lambda path: edit_manifest(path, *steps, value=value)


def step(op: str, **fields: object) -> Change:
    """Change fields of a step of the image processor; without fields, remove it."""

    def change(path: Path) -> None:
        document = json.loads((path / "manifest.json").read_text("utf-8"))
        config = document
        for name in IMAGE:
            config = config[name]
        steps = [{**each, **fields} if each["op"] == op else each for each in config["steps"]]
        kept = [each for each in steps if fields or each["op"] != op]
        edit_manifest(path, *IMAGE, "steps", value=kept)

    return change


def tensor(role: str, kind: str, **fields: object) -> Change:
    return lambda path: [
        edit_manifest(path, *ROLES, role, kind, 0, name, value=value)
        for name, value in fields.items()
    ]


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Change the tokenizer, with a manifest that agrees."""

    def change(path: Path) -> None:
        document = json.loads((path / "tokenizer.json").read_text("utf-8"))
        edit(document)
        (path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
        files = {name: entry.model_dump() for name, entry in describe_files(path).items()}
        edit_manifest(path, "files", value=files)

    return change


BROKEN: dict[str, tuple[Change, str]] = {
    "crop 10^9": (step("crop", height=10**9), r"crop\.height"),
    "crop 10^9 both": (step("crop", height=10**9, width=10**9), r"crop\.height"),
    "crop of 2^28 pixels": (step("crop", height=2**14, width=2**14), r"steps\.2\.crop"),
    "crop of another size": (step("crop", height=16, width=16), "'pixel_values': got .*16, 16"),
    "no crop": (step("crop"), r"'pixel_values': got \(1, 3, 8, 16\)"),
    "resize 2^40": (step("resize", height=2**40, width=2**40), r"resize\.height"),
    "two shortest edges": (step("resize", height=9), "shortest_edge: height 9 and width 8"),
    "std 0": (step("normalize", std=[0.2, 0, 0.2]), r"normalize\.std"),
    "std 1e-320": (step("normalize", std=[0.2, 1e-320, 0.2]), r"normalize\.std"),
    "std -1": (step("normalize", std=[0.2, -1, 0.2]), r"normalize\.std"),
    "mean 1e308": (step("normalize", mean=[1e308, 0, 0]), r"normalize\.mean"),
    "rescale 1e300": (step("rescale", factor=1e300), r"rescale\.factor"),
    "rescale 0": (step("rescale", factor=0.0), r"rescale\.factor"),
    "image input of another name": (setting(*IMAGE, "input", value="pixels"), "'pixels'"),
    "max_length 2^64": (setting(*TEXT, "max_length", value=2**64), "max_length"),
    "max_length 10^12": (setting(*TEXT, "max_length", value=10**12), "max_length"),
    "max_length beyond the axis": (setting(*TEXT, "max_length", value=7), "below max_length 7"),
    "max_length 2": (setting(*TEXT, "max_length", value=2), "max_length 2"),
    "max_length 0": (setting(*TEXT, "max_length", value=0), "max_length"),
    "pad_id 2^63": (setting(*TEXT, "pad_id", value=2**63), "pad_id"),
    "pad_id -1": (setting(*TEXT, "pad_id", value=-1), "pad_id"),
    "pad_id beyond the table": (setting(*TEXT, "pad_id", value=1000), "token id 1000.*pad_id"),
    "token ids beyond the table": (
        tokenizer(lambda document: document["model"]["vocab"].update(zebra=10**6)),
        "token id 1000000",
    ),
    "no vocabulary": (
        tokenizer(lambda document: document["model"].update(vocab={})),
        r"tokenizer\.json",
    ),
    "no tokenizer": (tokenizer(lambda document: document.clear()), "not a tokenizer"),
    "input shape 2^70": (
        tensor("image_encoder", "inputs", shape=["batch", 3, 2**70, 8]),
        r"shape|'pixel_values'",
    ),
    "input of another size": (
        tensor("image_encoder", "inputs", shape=["batch", 3, 16, 16]),
        r"golden inputs of image_encoder: 'pixel_values'",
    ),
    "input of another rank": (
        tensor("image_encoder", "inputs", shape=["batch", 3, 8]),
        r"golden inputs of image_encoder: 'pixel_values'",
    ),
    "input of another dtype": (
        tensor("image_encoder", "inputs", dtype="float16"),
        r"'pixel_values'.*expected pixel_values float16",
    ),
    "token ids as floats": (
        tensor("text_encoder", "inputs", dtype="float32"),
        r"'input_ids' is int64.*expected input_ids float32",
    ),
    "output of another size": (
        tensor("text_encoder", "outputs", shape=["batch", 7]),
        r"embedding|text_encoder.*7",
    ),
    "output of another rank": (
        tensor("text_encoder", "outputs", shape=["batch", 1, 4]),
        r"embedding|text_encoder.*4",
    ),
    "output of another dtype": (
        tensor("text_encoder", "outputs", dtype="int64"),
        r"'embedding'.* embedding int64",
    ),
    "output of another name": (
        tensor("text_encoder", "outputs", name="pooled"),
        r"pooled",
    ),
    "output shape 2^70": (
        tensor("image_encoder", "outputs", shape=["batch", 2**70]),
        r"image_encoder\.outputs\.0\.shape",
    ),
    "embedding_dim of another size": (setting(*KIND, "embedding_dim", value=5), r"\(batch, 5\)"),
    "embedding_dim null": (setting(*KIND, "embedding_dim", value=None), "embedding_dim"),
    "embedding_dim 2^70": (setting(*KIND, "embedding_dim", value=2**70), "embedding_dim"),
    "logit_scale 1e308": (setting(*HEAD, "logit_scale", value=1e308), "logit_scale"),
    "logit_scale 0": (setting(*HEAD, "logit_scale", value=0), "logit_scale"),
    "logit_scale -20": (setting(*HEAD, "logit_scale", value=-20), "logit_scale"),
    "logit_bias 1e308": (setting(*HEAD, "logit_bias", value=1e308), "logit_bias"),
    "no head": (setting(*HEAD, value=None), "contrastive_head"),
    "an empty label": (setting(*KIND, "label_banks", value={"x": [""]}), r"label_banks\.x"),
    "no labels": (setting(*KIND, "label_banks", value={"x": []}), r"label_banks\.x"),
    "encoders of swapped modalities": (
        setting(*KIND, "encoders", value={"image": "text_encoder", "text": "image_encoder"}),
        "is the image encoder, and takes text",
    ),
    "an encoder that is not there": (
        setting(*KIND, "encoders", value={"image": "tower"}),
        "'tower'",
    ),
    "no processor": (setting("processors", value={}), "processor 'image'"),
    "opset 2^70": (setting(*ROLES, "text_encoder", "variants", 0, "opset", value=2**70), "opset"),
    "a batch of 2^40": (
        setting(*ROLES, "image_encoder", "axes", "batch", "max", value=2**40),
        r"axes\.batch\.max",
    ),
    "a batch of 0": (
        setting(*ROLES, "image_encoder", "axes", value={"batch": {"min": 0, "opt": 0, "max": 0}}),
        r"axes\.batch\.max",
    ),
    "a tolerance of 1e308": (
        setting(
            *(*ROLES, "text_encoder", "variants", 0, "tolerance"),
            value={"cosine_min": 0.9, "max_abs_error": 1e308},
        ),
        r"tolerance\.max_abs_error",
    ),
    "a cosine of -1 tolerated": (
        setting(
            *(*ROLES, "text_encoder", "variants", 0, "tolerance"),
            value={"cosine_min": -1.0, "max_abs_error": 1.0},
        ),
        r"tolerance\.cosine_min",
    ),
    "a state of inputs that are not there": (
        setting(
            *(*ROLES, "text_encoder", "state"),
            value={"tensors": [{"input": "past", "output": "embedding", "update": "replace"}]},
        ),
        "inputs fed by the state",
    ),
}


def verify(path: Path) -> None:
    """Do what `mmedge verify` does."""
    opened = open_bundle(path)
    verify_files(opened)
    verify_bundle(opened)


@pytest.mark.parametrize("what", BROKEN)
def test_verify_refuses_bundles_that_cannot_encode(what: str, tiny_bundle: Bundle) -> None:
    change, field = BROKEN[what]
    change(tiny_bundle.path)
    with pytest.raises(MmedgeError, match=field) as caught:
        verify(tiny_bundle.path)
    assert str(tiny_bundle.path) in str(caught.value)


@pytest.mark.parametrize(
    ("what", "field"),
    [
        (
            "input of another size",
            r"input 'pixel_values': pixel_values float32\(batch, 3, 16, 16\)",
        ),
        ("output of another dtype", "output 'embedding': embedding int64"),
        ("output of another name", "output names: .*'pooled'"),
    ],
)
def test_load_refuses_a_graph_that_the_manifest_does_not_describe(
    what: str, field: str, tiny_bundle: Bundle
) -> None:
    BROKEN[what][0](tiny_bundle.path)
    with pytest.raises(ManifestError, match=f"the manifest and the graph of .* differ in {field}"):
        mmedge.load(tiny_bundle.path)


def test_an_open_axis_of_the_graph_may_be_fixed_in_the_manifest(tiny_bundle: Bundle) -> None:
    tensor("image_encoder", "inputs", shape=[2, 3, 8, 8])(tiny_bundle.path)
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"]) as model:
        assert model.sessions["image_encoder"].inputs[0].shape == ("batch", 3, 8, 8)


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    2**70,
    1e308,
    -1e-320,
    0.5,
    "",
    "x",
    "../x",
    "int8",
]
HOSTILE += [[], {}, [2**70], ["", ""], {"x": 1}, [[[[]]]], "\u2028", "x" * 2000]


def places(node: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the place of every value of a document."""
    found = [path] if path else []
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            found += places(value, (*path, name))
    return found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_verified_bundles_can_encode(data: st.DataObject, tiny_bundle: Bundle) -> None:
    """Whatever value of the manifest is replaced: an MmedgeError, or a bundle that works."""
    manifest = tiny_bundle.path / "manifest.json"
    original = manifest.read_bytes()
    try:
        document = json.loads(original)
        spots = [place for place in places(document) if place[0] not in ("files", "provenance")]
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.sampled_from(spots))
            with suppress(KeyError, IndexError, TypeError):  # inside what was replaced before
                edit_manifest(tiny_bundle.path, *place, value=data.draw(st.sampled_from(HOSTILE)))
        try:
            verify(tiny_bundle.path)
        except MmedgeError:
            return
        with mmedge.load(tiny_bundle.path) as model:
            frame, words = np.full((9, 20, 3), 7, np.uint8), "a red circle " * 1000
            for vectors in (model.encode_image(frame), model.encode_text(words)):
                assert vectors.shape == (1, model.embedding_dim)
                assert np.isfinite(vectors).all()
    finally:
        manifest.write_bytes(original)
