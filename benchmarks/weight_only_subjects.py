"""Subjects of benchmarks/weight_only.py: float32 graphs, calibration and held-out data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import full_size
import numpy as np
import onnx_ir as ir
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mmedge.bundle import open_bundle
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.datasets import read_dataset
from mmedge.converters.families import family_of
from mmedge.converters.graphs.export import export_role
from mmedge.converters.quantization.output_errors import SENSITIVITY_SAMPLES
from mmedge.converters.request import convert
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import open_source
from mmedge.preprocess import ImageProcessor
from mmedge.preprocess.registry import open_processor
from mmedge.specs import Array

__all__ = ["Feed", "Subject", "decoder", "encoder", "trained"]

Feed = dict[str, Array]
_ROOT = Path(__file__).parents[1]
_CACHE = full_size.CACHE / "weight-only"
_TOKENS = 64
_HELD_OUT_SAMPLES = 16
# Each of its 145 layers costs an opening of a large graph, and a run for each sample.
_ENCODER_SENSITIVITY_SAMPLES = 1


@dataclass(frozen=True)
class Subject:
    """One graph.

    Attributes:
        name: For the table.
        model: In float32.
        calibration: Feeds for second moments.
        held_out: Feeds that fidelity is measured on.
        timed: Feeds that time is measured on, by name.
        sensitivity_samples: Rows of the calibration data that the choice of layers for 2 bits is
            measured on, each layer alone.
    """

    name: str
    model: Path
    calibration: Sequence[Feed]
    held_out: Sequence[Feed]
    timed: dict[str, Feed]
    sensitivity_samples: int = SENSITIVITY_SAMPLES


def decoder() -> Subject:
    """Return GPT-2's forward pass without cache, 124 million random parameters, head tied."""
    model = _CACHE / "gpt2" / "fp32.onnx"
    if not model.is_file():
        _export_decoder(model)
    rng = np.random.default_rng(1)

    def ids(batch: int, length: int) -> Feed:
        return {"input_ids": rng.integers(0, 50257, (batch, length))}

    return Subject(
        "decoder, 124 M",
        model,
        [ids(4, _TOKENS) for _ in range(16)],
        [ids(1, _TOKENS) for _ in range(_HELD_OUT_SAMPLES)],
        {"1 token": ids(1, 1), f"{_TOKENS} tokens": ids(1, _TOKENS)},
        sensitivity_samples=4,
    )


class _Logits(torch.nn.Module):
    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden[:, -1])
        return logits


def _export_decoder(out: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                _spread(parameter)
            elif "ln" in name and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    program = torch.onnx.export(
        _Logits(model),
        (torch.randint(0, 50257, (2, 9)),),
        dynamo=True,
        opset_version=20,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=1024)},),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch exported nothing")
    out.parent.mkdir(parents=True, exist_ok=True)
    ir.save(program.model, out, external_data=f"{out.name}.data", size_threshold_bytes=1024)


def _spread(weight: torch.Tensor) -> None:
    """Give a weight the heavier tails, and columns of unequal size, that training gives."""
    tails = torch.distributions.StudentT(torch.tensor(5.0)).sample(weight.shape)
    columns = torch.exp(0.3 * torch.randn(weight.shape[1]))
    weight.copy_(tails * columns * 0.0155)


def encoder() -> Subject:
    """Return the image encoder of ViT-L/14, 304 million random parameters."""
    model = _CACHE / "vit-l14" / "fp32.onnx"
    source = open_source(str(full_size.source("l14")))
    if not model.is_file():
        family = family_of(source)
        described = family.describe(source, family.load(source))
        export_role("image_encoder", described.roles["image_encoder"](), model)
    process = ImageProcessor(read_image_preprocessing(source, 224))

    first, *others = full_size.images(8, seed=2)
    held_out = [process([each]) for each in full_size.images(4, seed=3)]
    # Layers are measured on the first feed alone; the others in one batch are read faster.
    calibration = [process([first]), process(others)]
    return Subject(
        "ViT-L/14, 304 M",
        model,
        calibration,
        held_out,
        {"1 image": held_out[0]},
        sensitivity_samples=_ENCODER_SENSITIVITY_SAMPLES,
    )


def trained() -> tuple[Subject, Subject]:
    """Return both encoders of the shapes CLIP; their held-out samples belong together, in order."""
    out = full_size.CACHE / "clip-shapes.mmedge"
    if not (out / "manifest.json").is_file():
        source = _ROOT / "examples" / "shapes" / "clip"
        convert(ConvertConfig(source=str(source), out=out, precisions=("fp32",)))
    bundle = open_bundle(out)
    processors = bundle.manifest.processors
    images = open_processor(processors["image"], bundle.path)
    texts = open_processor(processors["text"], bundle.path)
    feeds: dict[str, list[list[Feed]]] = {"image": [], "text": []}
    for split, count in (("calibration", 128), ("test", 500)):
        samples = read_dataset(_shapes(split, count)).samples
        feeds["image"].append([dict(images([sample.image])) for sample in samples])
        feeds["text"].append([dict(texts([sample.caption or ""])) for sample in samples])
    made = []
    for modality, (calibration, held_out) in feeds.items():
        model = bundle.model_path(
            bundle.variant(f"{modality}_encoder", "fp32"), layouts=("portable",)
        )
        made.append(Subject(f"shapes {modality}", model, calibration, held_out, {}))
    return made[0], made[1]


def _shapes(split: str, count: int) -> Path:
    folder = _CACHE / f"shapes-{split}-{count}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        script = _ROOT / "examples" / "shapes" / "generate.py"
        words = ["--split", split, "--count", str(count), "--out", str(folder)]
        subprocess.run([sys.executable, str(script), *words], check=True)
    return folder
