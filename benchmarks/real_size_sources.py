"""Encoders of real size with random weights: written once, in the formats that mmedge converts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from full_size import CACHE, images, tokenizer
from full_size import source as clip_source
from safetensors.torch import save_file
from torch import nn

from mmedge.converters.families.open_clip_config import TimmVisionConfig, read_model_config
from mmedge.converters.families.open_clip_modules import NativeTextTower
from mmedge.converters.families.open_clip_timm import TIMM, TimmVisionTower
from mmedge.converters.sources.config import Fields
from mmedge.specs import Array

__all__ = ["sounds", "source"]

_CLIP_TEXT = {"context_length": 77, "vocab_size": 512 + 1 + 2, "width": 64, "heads": 1, "layers": 1}
_OPEN_CLIP: dict[str, tuple[str, str, int]] = {
    "eva02-clip-b16": ("eva02_base_patch16_clip_224", "token", 512),
    "siglip-b16": ("vit_base_patch16_siglip_224", "map", 768),
}


def source(name: str) -> Path:
    """Return the folder of a model with random parameters, made on the first call.

    Args:
        name: A key of real_size_names.SUBJECTS.
    """
    if name in ("clip-b32", "clip-b16"):
        return clip_source("b32" if name == "clip-b32" else "b16")
    folder = CACHE / f"real-size-{name}"
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if name in _OPEN_CLIP:
        _write_open_clip(partial, *_OPEN_CLIP[name])
    else:
        _WRITERS[name](partial)
    partial.rename(folder)
    return folder


def sounds(
    count: int, seed: int, rate: int = 48_000, seconds: float = 9.0
) -> Iterator[tuple[Array, int]]:
    """Yield mono float32 sounds and their rate in Hz: chords that fade, with noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    for _ in range(count):
        tones = sum(
            rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * hz * time) * np.exp(-time * fade)
            for hz, fade in zip(rng.uniform(80, 9000, 6), rng.uniform(0, 1, 6), strict=True)
        )
        noise = rng.uniform(0.001, 0.1) * rng.standard_normal(len(time))
        yield np.clip(tones + noise, -1, 1).astype(np.float32), rate


def _spread(model: nn.Module) -> None:
    """Move norms and biases from the ones and zeros that no trained model has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.02)


def _write_open_clip(folder: Path, tower: str, pool: str, dim: int) -> None:
    vision = {
        "image_size": 224, "timm_model_name": tower, "timm_model_pretrained": False,
        "timm_pool": pool, "timm_proj": "none" if pool == "map" else None,
    }  # fmt: skip
    document = {
        "model_cfg": {
            "embed_dim": dim,
            "vision_cfg": vision,
            "text_cfg": _CLIP_TEXT,
            "custom_text": True,
        },
        "preprocess_cfg": {},
    }
    config = read_model_config(Fields(folder / "open_clip_config.json", document), 1000)
    if not isinstance(config.vision, TimmVisionConfig):
        raise TypeError(f"{tower}: expected a tower of timm.")
    weights: dict[str, torch.Tensor] = {"logit_scale": torch.tensor(4.6)}
    towers: dict[str, nn.Module] = {
        "visual": TimmVisionTower(config.vision, TIMM[tower], config.dim),
        "text": NativeTextTower(config.text, config.dim),
    }
    for prefix, module in towers.items():
        for name, tensor in module.state_dict().items():
            one = tensor.ndim == 1 and name.endswith("weight")
            drawn = torch.randn(tensor.shape) * (0.1 if one else 0.02) + float(one)
            weights[f"{prefix}.{name}"] = drawn
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")


def _write_dinov2(folder: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config()).eval()
    _spread(model)
    model.save_pretrained(folder)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(folder)


def _write_resnet(folder: Path) -> None:
    """Write a ResNet-50; its batch norms hold the statistics of images, as trained ones do."""
    model = transformers.ResNetModel(transformers.ResNetConfig()).train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
                norm.bias.add_(torch.randn_like(norm.bias) * 0.1)
                norm.momentum = None  # the mean over all batches
        for batch in range(3):
            pixels = np.stack(list(images(8, seed=50 + batch, size=(224, 224)))) / 255
            model(torch.from_numpy((pixels - 0.45) / 0.225).permute(0, 3, 1, 2).float())
    model.eval().save_pretrained(folder)
    transformers.ConvNextImageProcessorPil(
        size={"shortest_edge": 224},
        crop_pct=0.875,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


def _write_clap(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    roberta = transformers.RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=77)
    text = {
        "vocab_size": len(roberta), "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "intermediate_size": 64,
    }  # fmt: skip
    model = transformers.ClapModel(transformers.ClapConfig(text_config=text)).eval()
    _spread(model)
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0)  # of decibels
    norm.running_var.fill_(400.0)
    model.save_pretrained(folder)
    roberta.save_pretrained(folder)
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)


def _write_owlv2(folder: Path) -> None:
    vision = {"image_size": 960, "patch_size": 16}
    text = {"num_hidden_layers": 1}
    config = transformers.Owlv2Config(vision_config=vision, text_config=text)
    model = transformers.Owlv2ForObjectDetection(config).eval()
    _spread(model)
    model.save_pretrained(folder)
    tokenizer(config.text_config).save_pretrained(folder)
    transformers.Owlv2ImageProcessorPil().save_pretrained(folder)


_WRITERS: dict[str, Callable[[Path], None]] = {
    "clap": _write_clap,
    "dinov2-base": _write_dinov2,
    "owlv2-base": _write_owlv2,
    "resnet-50": _write_resnet,
}
