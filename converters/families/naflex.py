"""Image tower of SigLIP 2 NaFlex: patches of any grid, positions interpolated in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.towers import IMAGE_BATCH, embedding_role, seeded
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.steps import Patches
from mmedge.specs import TensorSpec

__all__ = ["naflex_role"]


class _NaflexEncoder(nn.Module):
    """pixel_values (B, N, 3 * size**2) float32, spatial_shapes (B, 2) int64 -> embedding (B, D).

    The shapes are rows and columns of patches; what stands behind the last patch has no effect.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "vision_model", model)

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        embeddings = self.tower.embeddings
        rows, columns = spatial_shapes[:, :1], spatial_shapes[:, 1:]
        number = torch.arange(pixel_values.shape[1])
        side = int(embeddings.position_embedding_size)
        # Of patches that are not there, any finite position will do.
        down = _weights(torch.minimum(number // columns, rows - 1), rows, side)
        across = _weights(number % columns, columns, side)
        places = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(2)
        hidden = embeddings.patch_embedding(pixel_values)
        hidden = hidden + places @ embeddings.position_embedding.weight
        seen = number < rows * columns
        mask = torch.where(seen[:, None, None], 0.0, torch.finfo(hidden.dtype).min)
        hidden = self.tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        pooled = self._pool(self.tower.post_layernorm(hidden), seen)
        return nn.functional.normalize(pooled, dim=-1)

    def _pool(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return the head's pooled states (B, D) of those (B, N, D) that are seen (B, N)."""
        head = self.tower.head
        probe = head.probe.expand(hidden.shape[0], -1, -1)
        mixed = head.attention(probe, hidden, hidden, key_padding_mask=~seen)[0]
        return cast(torch.Tensor, (mixed + head.mlp(head.layernorm(mixed)))[:, 0])


def _weights(at: torch.Tensor, size: torch.Tensor, side: int) -> torch.Tensor:
    """Return the share of each of `side` positions in a resized one: linear, antialiased.

    Equal to one axis of torch's interpolate, mode bilinear with antialias.

    Args:
        at: (B, N) int64, place along the resized axis.
        size: (B, 1) int64, length of the resized axis.
        side: Length of the axis that is resized.

    Returns:
        (B, N, side) float32; each row sums to 1.
    """
    scale = side / size.float()
    centre = (at.float() + 0.5) * scale
    distance = (torch.arange(side) + 0.5 - centre.unsqueeze(-1)).abs()
    weights = torch.relu(1 - distance / scale.clamp(min=1).unsqueeze(-1))
    return weights / weights.sum(dim=-1, keepdim=True)


def naflex_role(model: Any, processor: ImageConfig, dim: int) -> RoleSpec:  # noqa: ANN401
    """Describe an image tower that takes patches.

    Args:
        model: Siglip2Model, or its vision tower (transformers is untyped).
        processor: Frozen preprocessing, with patches.
        dim: D of the embedding.
    """
    patches = cast(Patches, processor.find(Patches))
    values = 3 * patches.size**2

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        batch = sizes["batch"]
        with seeded(seed):
            pixels = torch.rand(batch, patches.count, values) * 2 - 1
            rows = torch.randint(1, patches.count + 1, (batch,))
            columns = (torch.rand(batch) * (patches.count // rows)).long() + 1
        return {processor.input: pixels, patches.shapes: torch.stack([rows, columns], dim=1)}

    return embedding_role(
        _NaflexEncoder(model),
        (
            TensorSpec(processor.input, np.dtype(np.float32), ("batch", patches.count, values)),
            TensorSpec(patches.shapes, np.dtype(np.int64), ("batch", 2)),
        ),
        dim,
        processor="image",
        axes={"batch": IMAGE_BATCH},
        sample=sample,
    )
