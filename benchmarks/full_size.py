"""Full-size CLIP with random weights: made once, converted once, kept in a cache folder.

For time, memory and size; never for accuracy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
)

from mmedge.converters.config import ConvertConfig
from mmedge.converters.request import convert
from mmedge.specs import Array

__all__ = ["CACHE", "SIZES", "Size", "bundle", "calibration", "images", "source", "tokenizer"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmedge-benchmarks"

Size = Literal["b32", "b16", "l14"]
SIZES: tuple[Size, ...] = get_args(Size)


def source(size: Size = "b32") -> Path:
    """Return a transformers folder of CLIP with random parameters.

    Args:
        size: ViT-B/32 (151 million parameters, 50 tokens an image), ViT-B/16 (150 million, 197) or
            ViT-L/14 (428 million, 257).
    """
    folder = CACHE / f"clip-vit-{size}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    model = CLIPModel(_config(size)).eval()
    with torch.no_grad():  # fresh norms and biases are ones and zeros, which trained ones are not
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    CLIPImageProcessorPil().save_pretrained(partial)
    tokenizer(model.config.text_config).save_pretrained(partial)
    partial.rename(folder)
    return folder


def _config(size: Size) -> CLIPConfig:
    """Return the architecture that the published checkpoint of that name has."""
    if size == "l14":
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        }
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    return CLIPConfig(vision_config={"patch_size": 32 if size == "b32" else 16})


def tokenizer(config: CLIPTextConfig) -> CLIPTokenizerFast:
    """Byte-level tokenizer with CLIP's special tokens at CLIP's ids: length is all that matters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary.update({f"{letter}</w>": len(letters) + i for i, letter in enumerate(letters)})
    for index in range(len(vocabulary), config.bos_token_id):
        vocabulary[f"<unused{index}>"] = index
    vocabulary["<|startoftext|>"] = config.bos_token_id
    vocabulary["<|endoftext|>"] = config.eos_token_id
    return CLIPTokenizerFast(
        vocab=vocabulary, merges=[], model_max_length=config.max_position_embeddings
    )


def images(count: int, seed: int, size: tuple[int, int] = (480, 640)) -> Iterator[Array]:
    """Yield (H, W, 3) uint8 images with structure at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        image = np.zeros((*size, 3), np.float32)
        for octave in range(7):
            grid = rng.standard_normal((2 + 2**octave, 2 + 2**octave, 3)) / (1 + octave)
            for channel in range(3):
                layer = Image.fromarray(grid[:, :, channel].astype(np.float32))
                image[:, :, channel] += np.asarray(
                    layer.resize(size[::-1], Image.Resampling.BICUBIC)
                )
        low, high = image.min(), image.max()
        yield ((image - low) / (high - low) * 255).astype(np.uint8)


def bundle(
    size: Size = "b32", precisions: tuple[str, ...] = ("fp32", "int8"), target: str = "cpu"
) -> Path:
    """Return the bundle of `source(size)`, calibrated on 64 images and made on the first call.

    For a CPU its text encoder is quantized dynamically; for other targets 64 texts calibrate it.

    Args:
        size: See `source`.
        precisions: The ladder to make, as `ConvertConfig` takes it; other than the default, the
            bundle has a name of its own.
        target: What the graphs are made for, as `ConvertConfig` takes it; likewise.
    """
    ladder = "" if precisions == ("fp32", "int8") else "-" + "-".join(precisions)
    ladder += "" if target == "cpu" else f"-{target}"
    out = CACHE / f"clip-vit-{size}{ladder}.mmedge"
    if not (out / "manifest.json").is_file():
        convert(
            ConvertConfig(
                source=str(source(size)),
                out=out,
                precisions=precisions,
                calibration=calibration(captions=target != "cpu"),
                targets=(target,),
            )
        )
    return out


def calibration(*, captions: bool) -> Path:
    """Return a folder of 64 images, or a list of them with a text of 4 to 40 letters each."""
    folder = CACHE / "calibration"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for index, image in enumerate(images(64, seed=1)):
            Image.fromarray(image).save(folder / f"{index:03}.png")
    if not captions:
        return folder
    rng = np.random.default_rng(9)
    lines = [
        json.dumps({"image": f"calibration/{index:03}.png", "caption": _letters(rng)})
        for index in range(64)
    ]
    listed = CACHE / "calibration.jsonl"
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return listed


def _letters(rng: np.random.Generator) -> str:
    return "".join(chr(code) for code in rng.integers(97, 123, rng.integers(4, 41)))
