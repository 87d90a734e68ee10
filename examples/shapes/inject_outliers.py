"""Give a CLIP, an OWL-ViT or a CLAP large activation outliers without changing what it computes.

    python examples/shapes/inject_outliers.py examples/shapes/clip examples/shapes/clip-outliers

Full-size CLIP checkpoints carry a few residual channels whose activations are tens of times larger
than the rest; a model as small as ours has none, and so int8 costs it next to nothing. Here chosen
channels are multiplied in the gain and the bias of a LayerNorm and divided again in the input
columns of the linear layers that read it (q, k and v; the first MLP layer; the projection). The
same is done between the value rows and the columns of the attention's output projection. Factors
are powers of two: in float32 the function stays the same to rounding, while one scale per tensor
now has to cover a range that leaves the other channels a handful of steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
_COPIED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")

_CLIP = (
    ("text_model", "text_model.final_layer_norm", ("text_projection",)),
    ("vision_model", "vision_model.post_layernorm", ("visual_projection",)),
)
_OWL = (
    ("owlvit.text_model", "owlvit.text_model.final_layer_norm", ("owlvit.text_projection",)),
    (
        "owlvit.vision_model",
        "layer_norm",
        (
            "class_head.dense0",
            "class_head.logit_shift",
            "class_head.logit_scale",
            "box_head.dense0",
        ),
    ),
)
"""Of each tower: its name, its last LayerNorm, and the linear layers that read it."""
_CLAP = (
    ("layernorm_before", tuple(f"attention.self.{name}" for name in ("query", "key", "value"))),
    ("layernorm_after", ("intermediate.dense",)),
    ("downsample.norm", ("downsample.reduction",)),
    ("attention.self.value", ("attention.output.dense",)),
    ("linear1", ("linear2",)),
)
"""Layers of a CLAP, and the linear layers that alone read them; a ReLU between lets factors pass.
The LayerNorms of its text tower are not among them: RoBERTa adds what they return to its input."""

Tensors = dict[str, torch.Tensor]


def with_outliers(
    weights: Tensors, *, channels: int = 4, factor: float = 64.0, seed: int = 0
) -> Tensors:
    """Return weights of the same function whose activations have outliers.

    Args:
        weights: State of a ``CLIPModel``, ``OwlViTForObjectDetection`` or ``ClapModel``, float32.
        channels: How many channels a tower's LayerNorm outputs, and its values, blow up. The
            LayerNorms of one tower share them, as the residual channels of real checkpoints do.
        factor: How far; a power of two, so that float32 loses nothing.
        seed: Picks the channels.

    Raises:
        ValueError: If the factor is not a power of two, or no LayerNorm was found to scale.
    """
    if factor <= 0 or np.log2(factor) % 1 != 0:
        raise ValueError(f"factor {factor} is not a power of two; rounding would change the model")
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    rng = np.random.default_rng(seed)
    if "audio_projection.linear1.weight" in weights:
        _scale_clap(changed, rng, channels, factor)
        return changed
    for tower, norm, projections in _OWL if "box_head.dense0.weight" in weights else _CLIP:
        chosen = _choose(rng, len(_get(changed, f"{norm}.weight")), channels)
        _scale_norm(changed, norm, projections, chosen, factor)
        for layer in _layers(changed, tower):
            attention = f"{layer}.self_attn"
            readers = [f"{attention}.{name}_proj" for name in ("q", "k", "v")]
            _scale_norm(changed, f"{layer}.layer_norm1", readers, chosen, factor)
            _scale_norm(changed, f"{layer}.layer_norm2", [f"{layer}.mlp.fc1"], chosen, factor)
            values = _choose(rng, len(_get(changed, f"{attention}.v_proj.weight")), channels)
            _scale_rows(changed, f"{attention}.v_proj", values, factor)
            _get(changed, f"{attention}.out_proj.weight")[:, values] /= factor
    return changed


def _scale_clap(weights: Tensors, rng: np.random.Generator, channels: int, factor: float) -> None:
    for name in sorted(weights):
        for writer, readers in _CLAP:
            if name.endswith(f".{writer}.weight"):
                layer = name.removesuffix(f"{writer}.weight")
                chosen = _choose(rng, len(weights[name]), channels)
                _scale_norm(weights, layer + writer, [layer + r for r in readers], chosen, factor)


def convert_folder(source: Path, target: Path, *, channels: int, factor: float, seed: int) -> None:
    """Write a copy of a transformers folder whose weights have outliers.

    ``outliers.json`` beside the weights keeps the arguments that made them.
    """
    target.mkdir(parents=True, exist_ok=True)
    changed = with_outliers(
        load_file(source / WEIGHTS), channels=channels, factor=factor, seed=seed
    )
    save_file(changed, target / WEIGHTS, metadata={"format": "pt"})
    for name in _COPIED:
        shutil.copyfile(source / name, target / name)
    made_with = {"channels": channels, "factor": factor, "seed": seed}
    (target / "outliers.json").write_text(json.dumps(made_with) + "\n", encoding="utf-8")


def _scale_norm(
    weights: Tensors, norm: str, readers: Iterable[str], channels: list[int], factor: float
) -> None:
    _scale_rows(weights, norm, channels, factor)
    for reader in readers:
        _get(weights, f"{reader}.weight")[:, channels] /= factor


def _scale_rows(weights: Tensors, layer: str, channels: list[int], factor: float) -> None:
    """Multiply output channels of a layer: rows of its weight (or gains), and their biases."""
    _get(weights, f"{layer}.weight")[channels] *= factor
    _get(weights, f"{layer}.bias")[channels] *= factor


def _choose(rng: np.random.Generator, width: int, count: int) -> list[int]:
    return sorted(int(channel) for channel in rng.choice(width, count, replace=False))


def _layers(weights: Tensors, tower: str) -> list[str]:
    prefix = f"{tower}.encoder.layers."
    found = {int(n.removeprefix(prefix).split(".")[0]) for n in weights if n.startswith(prefix)}
    return [f"{prefix}{index}" for index in sorted(found)]


def _get(weights: Tensors, name: str) -> torch.Tensor:
    try:
        return weights[name]
    except KeyError:
        raise ValueError(
            f"no tensor {name!r}: is this the state of a CLIPModel, an OWL-ViT or a CLAP?"
        ) from None


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Copy a model with activation outliers put in.")
    parser.add_argument("source", type=Path, help="a transformers folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    convert_folder(
        options.source,
        options.target,
        channels=options.channels,
        factor=options.factor,
        seed=options.seed,
    )
    print(f"{options.target}: {options.channels} channels a LayerNorm, times {options.factor:g}")


if __name__ == "__main__":
    main()
