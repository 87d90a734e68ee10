"""ViT: a plain vision transformer (Dosovitskiy et al., 2021).

The embedding is what the checkpoint pools: `pooler_output` where it has a pooler, else the CLS
token of the last layer norm, which is also what a classification head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from mmedge.converters.families.image_models import ImageModelFamily
from mmedge.converters.sources.source import Source

__all__ = ["FAMILY"]


class Vit(ImageModelFamily):
    """ViTModel with or without its pooler, and ViTForImageClassification."""

    name = "vit"
    classes: Mapping[str, str] = {"vit": "ViT"}

    def options(self, source: Source) -> Mapping[str, Any]:
        """Return whether the checkpoint has a pooler: DINO's, say, has none."""
        return {"add_pooling_layer": any(".pooler." in f".{name}" for name in source.shapes)}

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return the width of the pooler, if any, else of the encoder."""
        pooler = model.base_model.pooler
        return int(model.config.hidden_size if pooler is None else pooler.dense.out_features)

    def embedding(self, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the pooled CLS token, or the CLS token itself."""
        pooled = outputs.pooler_output
        return cast(torch.Tensor, outputs.last_hidden_state[:, 0] if pooled is None else pooled)

    def logits(self, model: Any, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the head's output for the CLS token."""
        return cast(torch.Tensor, model.classifier(outputs.last_hidden_state[:, 0]))


FAMILY = Vit()
