"""Taps: what heads read of an encoder is what the source's own model has between its blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from describing import describe
from open_clip_cases import CASES, RECORDED, write_checkpoint

import mmedge
from mmedge.bundle import open_bundle
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.manifest import Manifest
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.taps import with_taps
from mmedge.errors import ConversionError, InputError, SpaceMismatchError
from mmedge.models import DualEncoder
from mmedge.specs import Array

FRAMES = np.random.default_rng(0).integers(0, 256, (11, 30, 40, 3), dtype=np.uint8)
TEXTS = ["a", "a red star left of a blue circle", "star"]


def outputs_of(spec: RoleSpec) -> tuple[dict[str, torch.Tensor], dict[str, Array]]:
    """Inputs that a role draws for a batch of 3, and what its module makes of them, by name."""
    sizes = {name: min(axis.max, 3 if name == "batch" else 9) for name, axis in spec.axes.items()}
    feed = spec.sample(sizes, 5)
    assert spec.module is not None
    with torch.inference_mode():
        made = spec.module(*(feed[item.name] for item in spec.inputs))
    names = [item.name for item in spec.outputs]
    for item, array in zip(spec.outputs, made, strict=True):
        sized = [n if isinstance(n, int) else sizes[n] for n in item.shape]
        assert list(array.shape) == sized
    return feed, {name: array.numpy() for name, array in zip(names, made, strict=True)}


@pytest.mark.parametrize("fixture", ["clip_folder", "siglip_folder"])
def test_a_tap_is_the_hidden_state_before_the_last_block(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    described = describe(request.getfixturevalue(fixture))
    model: Any = described.model
    made = with_taps(described.spec, ("patches", "patches@2", "tokens", "tokens@2"))
    for role, tower, tap, skip in (
        ("image_encoder", model.vision_model, "patches", int(fixture == "clip_folder")),
        ("text_encoder", model.text_model, "tokens", 0),
    ):
        plain = described.spec.roles[role]()
        spec = made.roles[role]()
        feed, got = outputs_of(spec)
        with torch.inference_mode():
            states = tower(**feed, output_hidden_states=True).hidden_states
            assert plain.module is not None
            embedding = plain.module(*(feed[item.name] for item in plain.inputs))
        for name, blocks in ((tap, 1), (f"{tap}@2", 2)):
            np.testing.assert_allclose(got[name], states[blocks][:, skip:].numpy(), atol=1e-5)
        np.testing.assert_allclose(got["embedding"], embedding.numpy(), atol=1e-6)


@pytest.mark.parametrize(("case", "text"), [("vit", True), ("bert", True), ("coca", False)])
def test_open_clips_towers_have_taps(case: str, text: bool, tmp_path: Path) -> None:
    shapes = json.loads(RECORDED.read_text(encoding="utf-8"))[case]["shapes"]
    described = describe(write_checkpoint(tmp_path / case, CASES[case], shapes))
    if not text:  # a class token stands among its tokens
        with pytest.raises(ConversionError, match="got 'tokens', expected some of embedding"):
            with_taps(described.spec, ("tokens",))
    taps = ("patches", "tokens") if text else ("patches",)
    made = with_taps(described.spec, taps)
    assert isinstance(made.kind, DualEncoderKind)
    assert {tap.blocks for tap in made.kind.taps.values()} == {1}
    _, image = outputs_of(made.roles["image_encoder"]())
    assert image["patches"].shape == (3, 16, 32)
    if text:
        feed, got = outputs_of(made.roles["text_encoder"]())
        mask, ids = got["tokens_mask"], feed["input_ids"].numpy()
        lengths = (ids != 0).sum(axis=1) if case == "bert" else ids.argmax(axis=1) + 1
        np.testing.assert_array_equal(mask.sum(axis=1), lengths)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("patch", "expected some of embedding, patches, tokens.*Did you mean patches"),
        ("patches@3", "patches@3: the image_encoder has 2 blocks"),
        ("patches@0", "expected 1 to 2 after the @"),
        ("patches@x", "a number of blocks may follow"),
    ],
)
def test_a_tap_that_is_not_there(tap: str, message: str, clip_folder: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        with_taps(describe(clip_folder).spec, (tap,))


def test_without_taps_nothing_changes(clip_folder: Path) -> None:
    spec = describe(clip_folder).spec
    assert with_taps(spec, ()) is spec
    assert with_taps(spec, ("embedding",)) is spec


def test_the_manifest_names_taps_with_their_fingerprints(tapped_bundle: Path) -> None:
    manifest = open_bundle(tapped_bundle).manifest
    kind = manifest.kind
    assert isinstance(kind, DualEncoderKind)
    assert {name: (tap.role, tap.blocks, tap.mask) for name, tap in kind.taps.items()} == {
        "patches": ("image_encoder", 1, None),
        "tokens": ("text_encoder", 1, "tokens_mask"),
    }
    for role, tap in (("image_encoder", "patches"), ("text_encoder", "tokens")):
        for variant in manifest.roles[role].variants:
            assert variant.taps == {tap: f"{variant.space}/{tap}@1"}
    document = manifest.model_dump(mode="json")
    document["kind"]["taps"]["patches"]["role"] = "text_encoder"
    with pytest.raises(ValueError, match="tap 'patches': text_encoder has no output"):
        Manifest.model_validate(document)


def test_a_tap_before_the_last_block_keeps_the_saving_of_the_pooled_token(
    tapped_bundle: Path,
) -> None:
    graph = onnx.load(tapped_bundle / "image_encoder/fp32.onnx", load_external_data=False).graph
    narrowed = [node for node in graph.node if node.name.endswith("_token")]
    assert [node.op_type for node in narrowed].count("MatMul") >= 4  # query, output, MLP


def test_one_run_serves_every_head(tapped_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DualEncoder.load(tapped_bundle, precision="fp32") as clip:
        runs: list[str] = []
        run = clip._run
        monkeypatch.setattr(clip, "_run", lambda role, feed: runs.append(role) or run(role, feed))
        features = clip.extract(FRAMES[0], time=2.5)
        assert runs == ["image_encoder"]
        assert (len(features), features.time) == (1, 2.5)
        assert features["patches"].shape == (1, 16, 32)
        found = clip.classify(features, ["red", "blue"]).probabilities
        clip.similarity(features, clip.extract_text(TEXTS))
        assert runs.count("image_encoder") == 1
        np.testing.assert_array_equal(
            found, clip.classify(FRAMES[0], ["red", "blue"]).probabilities
        )
        with pytest.raises(InputError, match=r"No tap 'tokens', only \['embedding', 'patches'\]"):
            features["tokens"]
        with pytest.raises(SpaceMismatchError, match="got text features"):
            clip.classify(clip.extract_text("a"), ["red"])


def test_features_of_several_batches_are_joined(tapped_bundle: Path) -> None:
    with mmedge.load(tapped_bundle, precision="fp32") as clip:
        assert isinstance(clip, DualEncoder)
        features, alone = clip.extract(FRAMES), clip.extract(FRAMES[9])
        assert features.embedding.shape == (11, 16)
        np.testing.assert_allclose(features["patches"][9], alone["patches"][0], atol=1e-5)
        np.testing.assert_array_equal(features.embedding, clip.encode_image(FRAMES))
        texts = clip.extract_text(TEXTS, batch_size=1)
        together = clip.extract_text(TEXTS)
        np.testing.assert_allclose(texts.embedding, clip.encode_text(TEXTS), atol=1e-5)
        lengths = [[3, 20, 6]] * 2
        assert [made.masks["tokens"].sum(axis=1).tolist() for made in (texts, together)] == lengths
        for made in (texts, together):
            assert made["tokens"].shape[:2] == made.masks["tokens"].shape
        kept = texts.masks["tokens"]
        width = min(texts["tokens"].shape[1], together["tokens"].shape[1])
        np.testing.assert_allclose(
            texts["tokens"][kept], together["tokens"][:, :width][kept[:, :width]], atol=1e-5
        )
        with pytest.raises(InputError, match="got no image, expected at least one"):
            clip.extract([])


def test_features_of_another_encoder_are_refused(tapped_bundle: Path, tiny_bundle: Any) -> None:
    with DualEncoder.load(tapped_bundle) as clip:
        features = clip.extract(FRAMES[0])
    with (
        DualEncoder.load(tiny_bundle.path) as other,
        pytest.raises(SpaceMismatchError, match=r"got image features of 'clip-.*'tiny-0001'"),
    ):
        other.classify(features, ["red"])
