"""OWL-ViT and OWLv2: a box and a class embedding for each patch (Minderer et al., 2022, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.kinds.detector import OBJECTNESS
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import IMAGE_BATCH, TextEncoder, seeded, text_role
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
)
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.specs import Compare, Task, TensorSpec

__all__ = ["OWLV2", "OWLVIT"]

_THRESHOLD = 0.1  # transformers' own default


class _ImageEncoder(nn.Module):
    """pixel_values (B, 3, H, W) -> per patch: class embedding, box, shift, scale, objectness.

    class_embeddings (B, P, D), boxes (B, P, 4) in 0..1, shift, scale and, in OWLv2, objectness
    (B, P) float32. The logit of a query is (cosine + shift) * scale.
    """

    def __init__(self, model: Any, tower: nn.Module) -> None:  # noqa: ANN401
        super().__init__()
        self.tower = tower
        self.layer_norm, self.class_head = model.layer_norm, model.class_head
        self.box_head = model.box_head
        self.box_bias = nn.Buffer(model.box_bias.clone(), persistent=False)
        self.objectness_head = getattr(model, "objectness_head", None)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tower = cast(Any, self.tower)
        hidden = tower.post_layernorm(tower(pixel_values)[0])
        patches = self.layer_norm(hidden[:, 1:] * hidden[:, :1])
        head = self.class_head
        outputs = [
            head.dense0(patches),
            torch.sigmoid(self.box_head(patches) + self.box_bias),
            head.logit_shift(patches)[..., 0],
            head.elu(head.logit_scale(patches))[..., 0] + 1,
        ]
        if self.objectness_head is not None:
            outputs.append(self.objectness_head(patches)[..., 0])
        return tuple(outputs)


class Owl:
    """OWL-ViT, or OWLv2, which adds objectness and pads images to a square."""

    def __init__(self, name: str, model_class: str) -> None:
        self.name = name
        self._class = model_class

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this model type."""
        return source.model_type == self.name

    def load(self, source: Source) -> nn.Module:
        """Load the detector in fp32; unreadable processors raise."""
        _image_config(source)
        _text_config(source, load_tokenizer(source))
        return load_model(source, model_class=self._class)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the text encoder and the image encoder, heads inside."""
        owl = cast(Any, model)
        inner = getattr(owl, self.name)
        tokenizer = load_tokenizer(source)
        text = owl.config.text_config
        dim = int(text.hidden_size)

        def close(ids: torch.Tensor) -> None:
            """End every row with the highest id, which the tower pools at, and nowhere else."""
            end = len(tokenizer) - 1
            ids[ids >= end] = 0
            ids[:, -1] = end

        return ModelSpec(
            kind=DetectorKind(text_encoder="text_encoder", threshold=_THRESHOLD),
            tasks=(Task.ZERO_SHOT_OBJECT_DETECTION,),
            roles={
                "text_encoder": lambda: text_role(
                    TextEncoder(inner), text, dim, dynamic_sequence=True, close=close
                ),
                "image_encoder": lambda: _image_role(owl, inner.vision_model, dim),
            },
            processors={
                "text": _text_config(source, tokenizer),
                "image": _image_config(source),
            },
            files={"tokenizer.json": backend_json(source, tokenizer).encode()},
            references={
                "text_encoder": inner.get_text_features,
                "image_encoder": lambda pixel_values: _class_embeddings(owl, pixel_values),
            },
        )


def _class_embeddings(owl: Any, pixel_values: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the source's own class embeddings of every patch, (B, P, D)."""
    features = owl.image_embedder(pixel_values)[0].flatten(1, 2)
    return cast(torch.Tensor, owl.class_predictor(features)[1])


def _image_config(source: Source) -> ImageConfig:
    side = read_part(source, "vision_config").integer("image_size", 1, 1 << 14)
    return read_image_preprocessing(source, side)


def _text_config(source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    # The tower pools at the highest id, so nothing behind the closing token counts.
    closing = (tokenizer("")["input_ids"] or [-1])[-1]
    highest = max(map(int, tokenizer.get_vocab().values()))
    if closing != highest:
        raise SourceError(
            f"{source.name}: the model pools at the highest token id, {highest}, but its tokenizer "
            f"closes a text with id {closing}. Fetch the tokenizer of the model."
        )
    return TextConfig(
        max_length=longest_text(
            source, tokenizer, text.integer("max_position_embeddings", 1, 1 << 20)
        ),
        padding="longest",
        pad_id=closing if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
    )


def _image_role(owl: Any, tower: nn.Module, dim: int) -> RoleSpec:  # noqa: ANN401
    module = _ImageEncoder(owl, tower)
    vision = owl.config.vision_config
    side, patches = int(vision.image_size), len(module.box_bias)
    names = ["class_embeddings", "boxes", "shift", "scale"]
    names += [] if module.objectness_head is None else [OBJECTNESS]
    shapes = {"class_embeddings": (patches, dim), "boxes": (patches, 4)}
    float32 = np.dtype(np.float32)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):
            return {"pixel_values": torch.rand(sizes["batch"], 3, side, side) * 4 - 2}

    return RoleSpec(
        module=module,
        inputs=(TensorSpec("pixel_values", float32, ("batch", 3, side, side)),),
        outputs=tuple(
            TensorSpec(name, float32, ("batch", *shapes.get(name, (patches,)))) for name in names
        ),
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
        feeds={"pixel_values": ProcessorFeed(processor="image")},
        compare={
            name: Compare.ROWS if name == "class_embeddings" else Compare.VALUES for name in names
        },
    )


OWLVIT = Owl("owlvit", "OwlViTForObjectDetection")
OWLV2 = Owl("owlv2", "Owlv2ForObjectDetection")
