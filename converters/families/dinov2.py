"""DINOv2: self-supervised vision transformers, with or without registers (Oquab et al., 2023).

The embedding is `pooler_output`: the CLS token after the last layer norm. A classification head
reads that token and the mean of the patches, registers left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from mmedge.converters.families.image_models import ImageModelFamily
from mmedge.converters.families.loading import read_part
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.image import ImageProcessor

__all__ = ["FAMILY"]


class Dinov2(ImageModelFamily):
    """Dinov2Model, Dinov2ForImageClassification, and the same with registers."""

    name = "dinov2"
    classes: Mapping[str, str] = {
        "dinov2": "Dinov2",
        "dinov2_with_registers": "Dinov2WithRegisters",
    }

    def image_config(self, source: Source) -> ImageConfig:
        """Return the source's own preprocessing: of any size that patches cover."""
        config = read_image_preprocessing(source, None)
        patch = read_part(source, "vision_config").integer("patch_size", 1, 1 << 14)
        size = ImageProcessor(config).output_size
        if size is None or any(side % patch for side in size):
            raise SourceError(
                f"{source.folder / 'preprocessor_config.json'}: gives images of {size}, expected "
                f"multiples of the patch of {patch}. Correct crop_size."
            )
        return config

    def fitted(self, model: Any, size: tuple[int, int]) -> Any:  # noqa: ANN401
        """Return a copy, weights shared, whose position embeddings fit the size."""
        shared = {id(weight): weight for weight in model.parameters()}
        model = copy.deepcopy(model, shared)
        embeddings = model.base_model.embeddings
        patches = (size[0] // embeddings.patch_size) * (size[1] // embeddings.patch_size)
        shape = torch.empty(1, patches + 1, model.config.hidden_size, device="meta")
        with torch.no_grad():
            fixed = embeddings.interpolate_pos_encoding(shape, *size)
        embeddings.position_embeddings = nn.Parameter(fixed, requires_grad=False)
        embeddings.interpolate_pos_encoding = lambda *_: embeddings.position_embeddings
        return model

    def embedding(self, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the CLS token after the last layer norm."""
        return cast(torch.Tensor, outputs.pooler_output)

    def logits(self, model: Any, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the head's output for the CLS token beside the mean patch."""
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
        joined = torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)
        return cast(torch.Tensor, model.classifier(joined))


FAMILY = Dinov2()
