"""An OWL-ViT of 1.8 million weights, started from the trained CLIP, and its losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from dataset import IMAGE_SIZE, PATCH_SIZE
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers import (
    CLIPModel,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTModel,
)

GRID = IMAGE_SIZE // PATCH_SIZE
_LAYERS = 4
"""Image layers, the first ones of the CLIP's five: its patches are named by their content there."""
_START_SCALE, _START_SHIFT = 10.0, -0.5
"""First logits are 10 * (cosine - 0.5), so that few patches start out as things."""
_START_GAIN = 0.3
_NEGATIVE_WEIGHT, _FOCUS = 0.75, 2.0
_INNER, _INNER_WEIGHT = 0.7, 0.3
"""Patches within this share of a box learn the box, too, with this weight."""


def build_detector(clip: Path) -> OwlViTForObjectDetection:
    """Return a detector with the towers of a trained CLIP and new heads."""
    source = CLIPModel.from_pretrained(clip)
    text, vision = (
        {name: value for name, value in part.to_dict().items() if name != "model_type"}
        for part in (source.config.text_config, source.config.vision_config)
    )
    vision["num_hidden_layers"] = _LAYERS
    model = OwlViTForObjectDetection(
        OwlViTConfig(
            text_config=text, vision_config=vision, projection_dim=source.config.projection_dim
        )
    )
    weights = {
        name.replace("pre_layrnorm", "pre_layernorm"): value
        for name, value in source.state_dict().items()
    }
    model.owlvit.load_state_dict({name: weights[name] for name in model.owlvit.state_dict()})
    _start_heads(model)
    # On a CPU the plain attention's backward pass is several times faster than the fused one's.
    model.set_attn_implementation("eager")
    return model


def _start_heads(model: OwlViTForObjectDetection) -> None:
    """Start where patches can be read: transformers' own start is for far wider models.

    OWL-ViT multiplies each patch by the class token. (1 + g p) (1 + g c) begins as the sum of both.
    """
    norm, head, box_head = (
        model.owlvit.vision_model.post_layernorm, model.class_head, model.box_head,
    )  # fmt: skip
    torch.nn.init.constant_(norm.weight, _START_GAIN)
    torch.nn.init.ones_(norm.bias)
    for layer in (head.dense0, box_head.dense0, box_head.dense1):
        torch.nn.init.xavier_uniform_(layer.weight)
    for layer in (box_head.dense2, head.logit_scale, head.logit_shift):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(head.logit_scale.bias, _START_SCALE - 1.0)
    torch.nn.init.constant_(head.logit_shift.bias, _START_SHIFT)


def image_processor() -> OwlViTImageProcessorPil:
    """Return the preprocessing that goes with the model: OWL-ViT's own at 64 pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return OwlViTImageProcessorPil(size=side, crop_size=side)


def patch_states(
    owl: OwlViTModel, pixels: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the class token and the patches (B, 1 + K, W) after all layers.

    Args:
        owl: The two towers.
        pixels: (B, 3, 64, 64).
        kept: (B, K) int64, the patches to look at; None for all 64.
    """
    vision = owl.vision_model
    hidden: torch.Tensor = vision.embeddings(pixels)
    if kept is not None:
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.pre_layernorm(hidden)
    for layer in vision.encoder.layers:
        hidden = layer(hidden, None)
    return hidden


def detect(
    model: OwlViTForObjectDetection,
    hidden: torch.Tensor,
    queries: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the heads.

    Args:
        model: The float32 model.
        hidden: (B, 1 + K, W), from ``patch_states``.
        queries: (L, D), of the text tower.
        kept: (B, K) int64, the patches that ``hidden`` has; None for all 64.

    Returns:
        Logits (B, K, L) and boxes (B, K, 4): centre, width and height as fractions.
    """
    hidden = model.owlvit.vision_model.post_layernorm(hidden.float())
    patches = model.layer_norm(hidden[:, 1:] * hidden[:, :1])
    logits, _ = model.class_predictor(patches, queries[None].expand(len(patches), -1, -1))
    bias = model.box_bias if kept is None else model.box_bias[kept]
    return logits, torch.sigmoid(model.box_head(patches) + bias)


@dataclass(frozen=True)
class Targets:
    """What patches learn.

    Attributes:
        boxes: (B, K, 4) float32, left, top, right and bottom.
        weight: (B, K) float32, of the box; 0 for background.
        labels: (B, K) int64, of the thing whose box has its middle in the patch, else -1.
    """

    boxes: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor

    def at(self, kept: torch.Tensor) -> Targets:
        """Return those of some patches, (B, K) int64."""
        boxes = self.boxes.gather(1, kept[..., None].expand(-1, -1, 4))
        return Targets(boxes, self.weight.gather(1, kept), self.labels.gather(1, kept))

    def worth_seeing(self, count: int) -> torch.Tensor:
        """Return (B, count) int64, ascending: patches of things, and background at random."""
        worth = 2.0 * (self.labels >= 0) + (self.weight > 0) + torch.rand(self.weight.shape)
        return worth.topk(count, dim=1).indices.sort(dim=1).values


def assign(boxes: torch.Tensor, labels: torch.Tensor) -> Targets:
    """Assign things to patches.

    Args:
        boxes: (B, T, 4): left, top, right, bottom as fractions.
        labels: (B, T) int64; -1 where no thing is.

    Returns:
        What each of the 64 patches learns.
    """
    axis = (torch.arange(GRID) + 0.5) / GRID
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(1, 1, -1, 2)
    middle = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None]
    half = ((boxes[..., 2:] - boxes[..., :2]) / 2)[:, :, None]
    real = (labels >= 0)[:, :, None]
    offset = (grid - middle).abs()
    central = (offset <= 0.5 / GRID).all(dim=-1) & real
    inner = (offset <= _INNER * half).all(dim=-1) & real
    weight = torch.where(central, 1.0, torch.where(inner, _INNER_WEIGHT, 0.0))
    best, owner = weight.max(dim=1)
    return Targets(
        boxes.gather(1, owner[..., None].expand(-1, -1, 4)),
        best,
        torch.where(central.any(dim=1), labels.gather(1, owner), -1),
    )


def detection_loss(
    logits: torch.Tensor, found: torch.Tensor, targets: Targets
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses of classes and of boxes, and the mean IoU of the patches that count.

    The right label of a patch learns the IoU of its box as its score (varifocal loss, H. Zhang et
    al., 2021), so that the best boxes come first; all other logits learn 0.

    Args:
        logits: (B, K, L).
        found: (B, K, 4), predicted boxes: centre, width and height.
        targets: Of these patches.
    """
    made = torch.cat([found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2], -1)
    overlap, general = _overlaps(made, targets.boxes)
    distance = (made - targets.boxes).abs().sum(dim=-1)
    each_box = (5.0 * distance + 2.0 * (1.0 - general)) * targets.weight
    rows, patches = (targets.labels >= 0).nonzero(as_tuple=True)
    reached = overlap.detach()[rows, patches]
    wanted = torch.zeros_like(logits)
    wanted[rows, patches, targets.labels[rows, patches]] = reached
    focus = _NEGATIVE_WEIGHT * logits.detach().sigmoid().pow(_FOCUS)
    each_label = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    class_loss = (each_label * torch.where(wanted > 0, wanted, focus)).sum() / len(rows)
    return class_loss, each_box.sum() / targets.weight.sum(), reached.mean()


def _overlaps(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return IoU and generalised IoU of boxes (..., 4), pair by pair."""
    inner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    shared, hull = inner.clamp(min=0).prod(dim=-1), outer.prod(dim=-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(dim=-1) for each in (first, second)]
    union = areas[0] + areas[1] - shared
    overlap = shared / union.clamp(min=1e-9)
    return overlap, overlap - (hull - union) / hull.clamp(min=1e-9)


def embed_queries(owl: OwlViTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the queries (L, D) of token rows (L, T), padded with the end token."""
    pooled = owl.text_model(input_ids=tokens).pooler_output
    return normalize(owl.text_projection(pooled).float(), dim=-1)


def to_pixels(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Normalise as the image processor does: (B, H, W, 3) uint8 to (B, 3, H, W) float32."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean, dtype=torch.float32)
    std = torch.tensor(processor.image_std, dtype=torch.float32)
    scaled = (torch.tensor(images).float() / 255.0 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()
