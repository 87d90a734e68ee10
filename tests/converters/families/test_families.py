"""CLIP, SigLIP and CLAP against transformers: weights, preprocessing, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from describing import Described, changed_config, describe, describe_frozen
from models.tiny_models import (
    CLAP_CONTEXT,
    CLIP_CONTEXT,
    SIGLIP_CONTEXT,
    clip_tokenizer,
    write_clip,
)
from safetensors.numpy import load_file, save_file

from mmedge.bundle.kinds import DualEncoderKind
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.sources.frozen import freeze
from mmedge.converters.sources.reference_processors import check_image_preprocessing
from mmedge.converters.sources.tokenizer import load_tokenizer
from mmedge.errors import ExportError, SourceError
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.preprocess.steps import Crop, Decode, Normalize, Rescale

TEXTS = ("a red circle", "Größe: naïve, 東京 🗼", "x" * 200, "tabs\tand\nlines")


@pytest.fixture(scope="module", params=["clip", "siglip", "clap"])
def described(request: pytest.FixtureRequest) -> Described:
    return describe(request.getfixturevalue(f"{request.param}_folder"))


def run(spec: RoleSpec, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a role's module gives."""
    assert spec.module is not None
    with torch.inference_mode():
        output = spec.module(*feed.values())
    assert isinstance(output, torch.Tensor)
    return output


def test_towers_equal_the_whole_model(described: Described) -> None:
    roles = {name: make() for name, make in described.spec.roles.items()}
    kind = described.spec.kind
    assert isinstance(kind, DualEncoderKind)
    item = "audio" if described.family == "clap" else "image"
    assert sorted(roles) == [f"{item}_encoder", "text_encoder"] == sorted(kind.encoders.values())
    items = roles[f"{item}_encoder"].sample({"batch": 3}, 1)
    texts = roles["text_encoder"].sample({"batch": 3, "sequence": 9}, 2)
    with torch.inference_mode():
        whole = described.model(**items, **texts)
    ours = [run(roles[f"{item}_encoder"], items), run(roles["text_encoder"], texts)]
    for got, expected in zip(ours, (whole[f"{item}_embeds"], whole.text_embeds), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        assert got.shape == (3, kind.embedding_dim)
    head = kind.contrastive_head
    assert head is not None
    logits = ours[0] @ ours[1].T * head.logit_scale + head.logit_bias
    torch.testing.assert_close(logits, whole[f"logits_per_{item}"], atol=1e-4, rtol=1e-5)


def test_specs_name_dynamic_axes(described: Described) -> None:
    specs = {name: make() for name, make in described.spec.roles.items()}
    text = specs["text_encoder"]
    sequence: int | str = SIGLIP_CONTEXT if described.family == "siglip" else "sequence"
    assert text.inputs[0].shape == ("batch", sequence)
    for spec in specs.values():
        assert spec.inputs[0].shape[0] == spec.outputs[0].shape[0] == "batch"
        assert spec.trace_sizes["batch"] >= 2
        assert {sizes["batch"] for sizes in spec.proof_sizes} == {1, 3}
    if sequence == "sequence":
        longest = CLIP_CONTEXT if described.family == "clip" else CLAP_CONTEXT
        assert {2, longest} < {sizes["sequence"] for sizes in text.proof_sizes}
        assert text.axes["sequence"].max == longest


def test_samples_are_drawn_from_their_seed_alone(described: Described) -> None:
    for make in described.spec.roles.values():
        spec = make()
        name = spec.inputs[0].name
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first = spec.sample(spec.trace_sizes, 1)[name]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(first, spec.sample(spec.trace_sizes, 1)[name])
        assert not torch.equal(first, spec.sample(spec.trace_sizes, 2)[name])


def test_frozen_tokenizer_gives_the_ids_of_transformers(
    described: Described, tmp_path: Path
) -> None:
    config = described.spec.processors["text"]
    assert isinstance(config, TextConfig)
    expected = load_tokenizer(described.source)(
        list(TEXTS),
        padding=config.padding,
        truncation=True,
        max_length=config.max_length,
        return_tensors="np",
    )
    for name, got in described.freeze(tmp_path / "out")["text"](TEXTS).items():
        np.testing.assert_array_equal(got, expected[name])


def test_describing_is_reproducible(described: Described) -> None:
    again = describe(described.source.folder)
    assert again.spec.files == described.spec.files
    assert again.space == described.space


def test_a_tokenizer_that_differs_is_refused(described: Described, tmp_path: Path) -> None:
    changed = json.loads(described.spec.files["tokenizer.json"])
    changed["normalizer"] = {"type": "Replace", "pattern": {"String": "o"}, "content": "e"}
    files = {"tokenizer.json": json.dumps(changed).encode()}
    with pytest.raises(ExportError, match="The tokenizer cannot be frozen"):
        freeze(described.source, described.spec.processors, files, tmp_path)


@pytest.mark.parametrize("described", ["clip", "siglip"], indirect=True)
def test_a_preprocessing_that_differs_is_refused(described: Described, tmp_path: Path) -> None:
    config = described.spec.processors["image"]
    assert isinstance(config, ImageConfig)
    decode, resize, *rest = config.steps
    nearest = resize.model_copy(update={"resample": "nearest"})
    changed = config.model_copy(update={"steps": (decode, nearest, *rest)})
    with pytest.raises(ExportError, match="The preprocessing cannot be frozen"):
        freeze(described.source, {"image": changed}, {}, tmp_path)


@pytest.mark.parametrize("legacy", [False, True], ids=["eos", "legacy-eos-2"])
def test_tokens_after_the_end_token_have_no_effect(
    legacy: bool, clip_folder: Path, tmp_path: Path
) -> None:
    folder = write_clip(tmp_path / "legacy", eos_token_id=2) if legacy else clip_folder
    described = describe(folder)
    spec = described.spec.roles["text_encoder"]()
    texts = described.freeze(tmp_path / "out")["text"]
    ids = torch.from_numpy(texts(["a red circle"])["input_ids"])
    end = int(clip_tokenizer().eos_token_id)
    assert ids[0, -1] == end
    alone = run(spec, {"input_ids": ids})
    for fill in (end, 0, 7):
        padded = torch.full((2, CLIP_CONTEXT), fill)
        padded[:, : ids.shape[1]] = ids
        got = run(spec, {"input_ids": padded})
        torch.testing.assert_close(got, alone.expand(2, -1), atol=1e-6, rtol=0)
    # The end token itself does matter.
    moved = ids.clone()
    moved[0, -2] = end
    assert (run(spec, {"input_ids": moved}) - alone).abs().max() > 1e-3


def test_an_end_token_that_never_comes_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = changed_config(clip_folder, tmp_path, text_config={"eos_token_id": 5})
    with pytest.raises(SourceError, match=r"pools at token id 5.*closes a text with id 513"):
        describe(folder)


def test_weights_that_are_missing_are_not_made_up(clip_folder: Path, tmp_path: Path) -> None:
    folder = changed_config(clip_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "visual_projection.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 tensors \(visual_projection\.weight\)"):
        describe(folder)
    kept[name] = np.zeros((3, 3), np.float32)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"{name} is \(3, 3\), expected \(16, 32\)"):
        describe(folder)


def test_a_half_precision_checkpoint_is_loaded_in_fp32(clip_folder: Path, tmp_path: Path) -> None:
    folder = changed_config(clip_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    half = {key: value.astype(np.float16) for key, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    model = describe(folder).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_image_processors_need_no_torchvision(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.4 to 5.17 export a stand-in that refuses everything where there is none."""

    class Refuses:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoImageProcessor", Refuses)
    assert describe_frozen(clip_folder, tmp_path / "out").spec.processors["image"] is not None


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("preprocessor_config.json", "image processor cannot be loaded"),
        ("tokenizer*", "tokenizer"),
    ],
)
def test_a_processor_that_is_missing_is_named(
    remove: str, reason: str, clip_folder: Path, tmp_path: Path
) -> None:
    folder = changed_config(clip_folder, tmp_path)
    for path in folder.glob(remove):
        path.unlink()
    with pytest.raises(SourceError, match=reason):
        describe(folder)


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"size": {"height": 20, "width": 30}}, lambda c: (c.steps[1].mode, c.steps[1].width)),
        ({"do_center_crop": False, "size": {"height": 32, "width": 32}}, lambda c: c.find(Crop)),
        ({"do_normalize": False}, lambda c: c.find(Normalize)),
        ({"do_rescale": False}, lambda c: c.find(Rescale)),
        ({"resample": 2}, lambda c: c.steps[1].resample),
        ({"do_convert_rgb": None}, lambda c: c.steps[0].alpha),
    ],
)
def test_image_settings_are_read_from_the_folder(
    settings: dict[str, object], check: Callable[..., object], clip_folder: Path, tmp_path: Path
) -> None:
    folder = changed_config(clip_folder, tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    expected = {
        "size": ("exact", 30),
        "do_center_crop": None,
        "do_normalize": None,
        "do_rescale": None,
        "resample": "bilinear",
        "do_convert_rgb": "white",  # SigLIP 2 says nothing
    }
    described = describe(folder)
    config = described.spec.processors["image"]
    assert check(config) == expected[next(iter(settings))]
    assert isinstance(config, ImageConfig)
    check_image_preprocessing(described.source, config, folder)


def test_alpha_is_compared_with_the_reference(clip_folder: Path) -> None:
    described = describe(clip_folder)
    config = described.spec.processors["image"]
    assert isinstance(config, ImageConfig)
    dropped = config.model_copy(update={"steps": (Decode(alpha="drop"), *config.steps[1:])})
    with pytest.raises(ExportError, match="500x17 image differs"):
        check_image_preprocessing(described.source, dropped, clip_folder)
