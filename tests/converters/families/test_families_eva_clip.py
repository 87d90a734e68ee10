"""EVA-CLIP in BAAI's layout, against vectors that open_clip and timm gave for the same tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from describing import changed_config, describe
from models.tiny_eva_clip import VISION, write_eva_clip
from open_clip_cases import RECORDED, images
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mmedge import DualEncoder
from mmedge.bundle import open_bundle
from mmedge.converters import ConvertConfig, convert
from mmedge.errors import SourceError
from mmedge.preprocess import ImageConfig, ImageProcessor
from mmedge.preprocess.steps import Crop, Decode, Normalize, Rescale, Resize
from mmedge.sessions.verification import verify_bundle
from mmedge.specs import Array, Modality

# open_clip's own, which crops by other rounding than transformers does.
PREPROCESSING = ImageConfig(
    steps=(
        Decode(alpha="drop"),
        Resize(mode="shortest_edge", height=32, width=32, resample="bicubic"),
        Crop(height=32, width=32, rounding="nearest"),
        Rescale(factor=1 / 255),
        Normalize(
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
        ),
    )
)
PIXELS: Array = ImageProcessor(PREPROCESSING)(images())["pixel_values"]
RECORD: Mapping[str, Any] = json.loads(RECORDED.read_text("utf-8"))["eva02"]
IDS = {"input_ids": np.array(RECORD["ids"], np.int64)}


@dataclass(frozen=True)
class Converted:
    folder: Path
    bundle: Path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The tiny EVA-CLIP in fp32 and int8-dynamic."""
    place = tmp_path_factory.mktemp("eva-clip")
    folder = write_eva_clip(place / "source")
    precisions = ("fp32", "int8-dynamic")
    convert(ConvertConfig(str(folder), place / "eva.mmedge", precisions=precisions))
    return Converted(folder, place / "eva.mmedge")


@pytest.fixture(scope="module")
def encoder(converted: Converted) -> Iterator[DualEncoder]:
    with DualEncoder.load(converted.bundle, precision="fp32") as model:
        yield model


def test_embeddings_are_those_of_the_reference(encoder: DualEncoder) -> None:
    np.testing.assert_allclose(encoder.encode_image(PIXELS), RECORD["image"], atol=2e-5)
    got = encoder.encode_prepared(Modality.TEXT, IDS)
    np.testing.assert_allclose(got, RECORD["text"], atol=2e-5)
    head = encoder.manifest.kind.contrastive_head  # type: ignore[union-attr]
    assert abs(head.logit_scale - RECORD["scale"]) < 1e-4
    assert encoder.manifest.family == "eva_clip"


def test_int8_opens_runs_and_is_near(converted: Converted, encoder: DualEncoder) -> None:
    assert all(result.passed for result in verify_bundle(open_bundle(converted.bundle)))
    with DualEncoder.load(converted.bundle, precision="int8-dynamic") as small:
        near = (small.encode_image(PIXELS) * encoder.encode_image(PIXELS)).sum(axis=1)
        texts = ["a red circle", "the photo"]
        alike = (small.encode_text(texts) * encoder.encode_text(texts)).sum(axis=1)
    assert near.min() > 0.97
    assert alike.min() > 0.97


FORMS: Mapping[str, dict[str, object]] = {
    "8B": {"q_bias": False, "k_bias": False, "v_bias": False, "use_rms_norm": True},
    "8B-rope": {"use_rms_norm": True, "use_rope": True, "use_swiglu_mlp": True, "use_sub_ln": True,
                "rope_theta": 500.0, "pretrained_seq_len": 24},
    "E": {"post_layernorm": True, "k_bias": False},
    "quick": {"hidden_act": "quick_gelu", "use_sub_ln": True},
}  # fmt: skip
PLAIN = {name: value for name, value in VISION.items() if not name.startswith("use_")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_image_tower(form: str, converted: Converted, tmp_path: Path) -> None:
    """Against the tower written out on the tensors, rotary positions as complex numbers."""
    vision = {**PLAIN, "k_bias": True, **FORMS[form]}
    folder = shutil.copytree(converted.folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "vision_model.encoder" not in name}
    kept |= drawn(vision)
    if vision.get("use_rms_norm"):
        kept.pop("vision_model.post_layernorm.bias")
    save_file(kept, folder / "model.safetensors")
    spec = describe(folder).spec.roles["image_encoder"]()
    assert spec.module is not None
    with torch.inference_mode():
        got = spec.module(torch.from_numpy(PIXELS))
        expected = written_out(kept, vision, torch.from_numpy(PIXELS))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def drawn(vision: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of two blocks."""
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    width, hidden = 32, int(vision["intermediate_size"])
    gated, inner = vision.get("use_swiglu_mlp"), vision.get("use_sub_ln")

    def add(name: str, *shape: int, biased: object = True, norm: bool = False) -> None:
        weight = torch.randn(*shape, generator=generator) * 0.3 + int(norm)
        made[f"{name}.weight"] = weight
        if biased and not (norm and vision.get("use_rms_norm") and "ffn_ln" not in name):
            made[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3

    for number in range(2):
        place = f"vision_model.encoder.layers.{number}"
        for part in "qkv":
            biased = vision.get(f"{part}_bias", True)
            add(f"{place}.self_attn.{part}_proj", width, width, biased=biased)
        add(f"{place}.self_attn.out_proj", width, width)
        add(f"{place}.layer_norm1", width, norm=True)
        add(f"{place}.layer_norm2", width, norm=True)
        add(f"{place}.mlp.fc1", hidden, width)
        add(f"{place}.mlp.fc2", *((hidden, width) if gated else (width, hidden)))
        if gated:
            add(f"{place}.mlp.fc3", width, hidden)
        if inner:
            add(f"{place}.self_attn.inner_attn_ln", width, norm=True)
            add(f"{place}.mlp.ffn_ln", hidden, norm=True)
            if vision.get("use_rms_norm") and gated:
                made.pop(f"{place}.mlp.ffn_ln.bias")
    return made


def written_out(
    weights: Mapping[str, torch.Tensor], vision: Mapping[str, Any], pixels: torch.Tensor
) -> torch.Tensor:
    """The image tower on its tensors, as BAAI's papers and code describe it."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        if f"{name}.bias" not in weights:
            return functional.rms_norm(x, weight.shape, weight, eps)
        return functional.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], eps)

    def turned(x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(4) / 4 * vision["pretrained_seq_len"]
        angles = at[:, None] / vision["rope_theta"] ** (torch.arange(2) / 2)
        rows, columns = angles.repeat_interleave(4, 0), angles.repeat(4, 1)
        angle = torch.cat([rows, columns], dim=1)
        pairs = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous())
        rest = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return torch.cat([x[:, :, :1], rest], dim=2)

    place = "vision_model.embeddings"
    x = functional.conv2d(
        pixels, weights[f"{place}.patch_embedding.weight"],
        weights[f"{place}.patch_embedding.bias"], stride=8,
    ).flatten(2).transpose(1, 2)  # fmt: skip
    first = weights[f"{place}.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights[f"{place}.position_embedding.weight"]
    for number in range(2):
        block = f"vision_model.encoder.layers.{number}"
        behind = vision.get("post_layernorm", False)

        def attention(x: torch.Tensor, block: str = block) -> torch.Tensor:
            split = (
                linear(f"{block}.self_attn.{part}_proj", x).unflatten(-1, (4, -1)).transpose(1, 2)
                for part in "qkv"
            )
            query, key, value = split
            if vision.get("use_rope"):
                query, key = turned(query), turned(key)
            scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
            joined = (scores @ value).transpose(1, 2).flatten(2)
            if vision.get("use_sub_ln"):
                joined = norm(f"{block}.self_attn.inner_attn_ln", joined)
            return linear(f"{block}.self_attn.out_proj", joined)

        def mlp(x: torch.Tensor, block: str = block) -> torch.Tensor:
            hidden = linear(f"{block}.mlp.fc1", x)
            if vision.get("use_swiglu_mlp"):
                hidden = functional.silu(hidden) * linear(f"{block}.mlp.fc2", x)
                return linear(f"{block}.mlp.fc3", norm(f"{block}.mlp.ffn_ln", hidden))
            quick = vision.get("hidden_act") == "quick_gelu"
            hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else functional.gelu(hidden)
            if vision.get("use_sub_ln"):
                hidden = norm(f"{block}.mlp.ffn_ln", hidden, 1e-5)
            return linear(f"{block}.mlp.fc2", hidden)

        for name, branch in (("layer_norm1", attention), ("layer_norm2", mlp)):
            where = f"{block}.{name}"
            x = x + (norm(where, branch(x)) if behind else branch(norm(where, x)))
    pooled = norm("vision_model.post_layernorm", x[:, 0])
    return functional.normalize(linear("visual_projection", pooled), dim=-1)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"hidden_size": 64}, r"is .*, expected .*64"),
        ("vision_config", {"use_swiglu_mlp": False}, r"mlp\.fc3\.weight is not in the model"),
        ("vision_config", {"k_bias": True}, r"self_attn\.k_proj\.bias is missing"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ("vision_config", {"use_rope": "yes"}, "use_rope: got 'yes', expected true or false"),
        ("vision_config", {"num_attention_heads": 16}, "heads of a multiple of 4 values"),
        ("text_config", {"use_rope": True}, "texts have learned positions"),
        ("text_config", {"vocab_size": 8}, "the embedding table has 8 rows"),
    ],
)
def test_configurations_that_disagree_are_refused(
    section: str, changes: dict[str, object], message: str, converted: Converted, tmp_path: Path
) -> None:
    copy = changed_config(converted.folder, tmp_path, **{section: changes})
    with pytest.raises(SourceError, match=message):
        describe(copy)
