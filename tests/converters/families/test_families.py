"""CLIP and SigLIP against transformers: weights, preprocessing, tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_models import CLIP_CONTEXT, SIGLIP_CONTEXT, clip_tokenizer, write_clip
from safetensors.numpy import load_file, save_file

from mmedge.converters.families import FAMILIES, family_of
from mmedge.converters.families.base import Family, RoleSpec
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.frozen import freeze
from mmedge.converters.sources.source import Source, open_source
from mmedge.converters.sources.tokenizer import load_tokenizer
from mmedge.errors import ExportError, SourceError
from mmedge.preprocess.steps import Crop, Normalize, Rescale
from mmedge.specs import Modality

TEXTS = ("a red circle", "Größe: naïve, 東京 🗼", "x" * 200, "tabs\tand\nlines")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def source(request: pytest.FixtureRequest, clip_folder: Path, siglip_folder: Path) -> Source:
    folders = {"clip": clip_folder, "siglip": siglip_folder}
    return open_source(str(folders[request.param]))


def load(source: Source) -> tuple[Family, torch.nn.Module]:
    with quiet_libraries():
        family = family_of(source)
        return family, family.load(source)


def copy(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """Copy a source and set top-level keys of its config."""
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_towers_answer_as_the_whole_model_does(source: Source) -> None:
    family, model = load(source)
    specs = family.roles(model)
    assert sorted(specs) == ["image_encoder", "text_encoder"]
    image, text = specs["image_encoder"], specs["text_encoder"]
    pixels = image.sample({"batch": 3}, 1)
    ids = text.sample({"batch": 3, "sequence": 9}, 2)
    with torch.inference_mode():
        whole = model(**pixels, **ids)
        ours = [image.module(*pixels.values()), text.module(*ids.values())]
    for got, expected in zip(ours, (whole.image_embeds, whole.text_embeds), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        assert got.shape == (3, family.embedding_dim(model))
    head = family.head(model)
    logits = ours[0] @ ours[1].T * head.logit_scale + head.logit_bias
    torch.testing.assert_close(logits, whole.logits_per_image, atol=1e-4, rtol=1e-5)


def test_specs_say_what_is_dynamic(source: Source) -> None:
    family, model = load(source)
    specs = family.roles(model)
    assert specs["image_encoder"].modality is Modality.IMAGE
    assert specs["text_encoder"].modality is Modality.TEXT
    sequence: int | str = "sequence" if family.name == "clip" else SIGLIP_CONTEXT
    assert specs["text_encoder"].inputs[0].shape == ("batch", sequence)
    for spec in specs.values():
        assert spec.inputs[0].shape[0] == spec.outputs[0].shape[0] == "batch"
        assert spec.trace_sizes["batch"] >= 2
        assert {sizes["batch"] for sizes in spec.proof_sizes} == {1, 3}
    if family.name == "clip":
        lengths = {sizes["sequence"] for sizes in specs["text_encoder"].proof_sizes}
        assert {2, CLIP_CONTEXT} < lengths


def test_samples_are_drawn_from_their_seed_alone(source: Source) -> None:
    family, model = load(source)
    for spec in family.roles(model).values():
        sizes = {**spec.trace_sizes}
        name = spec.inputs[0].name
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first = spec.sample(sizes, 1)[name]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(first, spec.sample(sizes, 1)[name])
        assert not torch.equal(first, spec.sample(sizes, 2)[name])


def test_frozen_tokenizer_gives_the_ids_of_transformers(source: Source, tmp_path: Path) -> None:
    frozen = freeze(source, family_of(source), tmp_path)
    config = frozen.preprocessing.text
    assert config is not None
    reference = load_tokenizer(source)
    expected = reference(
        list(TEXTS),
        padding=config.padding,
        truncation=True,
        max_length=config.max_length,
        return_tensors="np",
    )["input_ids"]
    np.testing.assert_array_equal(frozen.texts(TEXTS)["input_ids"], expected)


def test_freezing_is_reproducible(source: Source, tmp_path: Path) -> None:
    spaces = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frozen = freeze(source, family_of(source), tmp_path / name)
        spaces.append(frozen.space("f", 8, "0", {}))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    assert spaces[0] == spaces[1]
    assert spaces[0] != frozen.space("f", 8, "1", {})
    assert spaces[0] != frozen.space("f", 8, "0", {"hidden_act": "gelu"})


def test_a_tokenizer_that_differs_is_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(source)
    content = family.tokenizer_json(source)
    changed = json.loads(content)
    changed["normalizer"] = {"type": "Replace", "pattern": {"String": "o"}, "content": "e"}
    monkeypatch.setattr(type(family), "tokenizer_json", lambda *_: json.dumps(changed))
    with pytest.raises(ExportError, match="The tokenizer cannot be frozen"):
        freeze(source, family, tmp_path)


def test_a_preprocessing_that_differs_is_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(source)
    config = family.image_preprocessing(source)
    decode, resize, *rest = config.steps
    nearest = resize.model_copy(update={"resample": "nearest"})
    changed = config.model_copy(update={"steps": (decode, nearest, *rest)})
    monkeypatch.setattr(type(family), "image_preprocessing", lambda *_: changed)
    with pytest.raises(ExportError, match="The preprocessing cannot be frozen"):
        freeze(source, family, tmp_path)


def clip_text(folder: Path) -> tuple[Source, RoleSpec]:
    source = open_source(str(folder))
    family, model = load(source)
    return source, family.roles(model)["text_encoder"]


@pytest.mark.parametrize("legacy", [False, True], ids=["eos", "legacy-eos-2"])
def test_what_stands_behind_the_end_token_cannot_matter(
    legacy: bool, clip_folder: Path, tmp_path: Path
) -> None:
    folder = write_clip(tmp_path / "legacy", eos_token_id=2) if legacy else clip_folder
    source, spec = clip_text(folder)
    frozen = freeze(source, family_of(source), tmp_path)
    ids = torch.from_numpy(frozen.texts(["a red circle"])["input_ids"])
    end = int(clip_tokenizer().eos_token_id)
    assert ids[0, -1] == end
    with torch.inference_mode():
        alone = spec.module(ids)
        for fill in (end, 0, 7):
            padded = torch.full((2, CLIP_CONTEXT), fill)
            padded[:, : ids.shape[1]] = ids
            got = spec.module(padded)
            torch.testing.assert_close(got, alone.expand(2, -1), atol=1e-6, rtol=0)
        # The end token itself does matter.
        moved = ids.clone()
        moved[0, -2] = end
        assert (spec.module(moved) - alone).abs().max() > 1e-3


def test_an_end_token_that_never_comes_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = copy(clip_folder, tmp_path, text_config={"eos_token_id": 5})
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=r"pools at token id 5.*closes a text with id 513"):
        family_of(source).text_preprocessing(source)


def test_weights_that_are_missing_are_not_made_up(clip_folder: Path, tmp_path: Path) -> None:
    folder = copy(clip_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "visual_projection.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 tensors \(visual_projection\.weight\)"):
        load(open_source(str(folder)))
    kept[name] = np.zeros((3, 3), np.float32)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"cannot be loaded|another shape"):
        load(open_source(str(folder)))


def test_a_half_precision_checkpoint_is_loaded_in_fp32(clip_folder: Path, tmp_path: Path) -> None:
    folder = copy(clip_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    half = {key: value.astype(np.float16) for key, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    _, model = load(open_source(str(folder)))
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
    source = open_source(str(clip_folder))
    with quiet_libraries():
        frozen = freeze(source, family_of(source), tmp_path)
    assert frozen.preprocessing.image is not None


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
    folder = copy(clip_folder, tmp_path)
    for path in folder.glob(remove):
        path.unlink()
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=reason), quiet_libraries():
        freeze(source, family_of(source), tmp_path)


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"size": {"height": 20, "width": 30}}, lambda c: (c.steps[1].mode, c.steps[1].width)),
        ({"do_center_crop": False, "size": {"height": 32, "width": 32}}, lambda c: c.find(Crop)),
        ({"do_normalize": False}, lambda c: c.find(Normalize)),
        ({"do_rescale": False}, lambda c: c.find(Rescale)),
        ({"resample": 2}, lambda c: c.steps[1].resample),
    ],
)
def test_image_settings_are_read_from_the_folder(
    settings: dict[str, object], check: Callable[..., object], clip_folder: Path, tmp_path: Path
) -> None:
    folder = copy(clip_folder, tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    expected = {
        "size": ("exact", 30),
        "do_center_crop": None,
        "do_normalize": None,
        "do_rescale": None,
        "resample": "bilinear",
    }
    source = open_source(str(folder))
    config = family_of(source).image_preprocessing(source)
    assert check(config) == expected[next(iter(settings))]
