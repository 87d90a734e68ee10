"""ResNet: a convolutional network (He et al., 2015).

The embedding is `pooler_output`, the mean of the last stage over all places, which is also what a
classification head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from mmedge.converters.families.image_models import ImageModelFamily
from mmedge.converters.families.loading import read_part
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.preprocess.config import ImageConfig

__all__ = ["FAMILY"]

_MAX_DEPTH, _MAX_WIDTH = 1 << 10, 1 << 17


class ResNet(ImageModelFamily):
    """ResNetModel and ResNetForImageClassification."""

    name = "resnet"
    classes: Mapping[str, str] = {"resnet": "ResNet"}
    head = "classifier.1.weight"

    def image_config(self, source: Source) -> ImageConfig:
        """Return the source's own preprocessing, of any size, and check the sizes of the net."""
        config = read_part(source, "vision_config")
        config.integer("num_channels", 3, 3)
        config.integer("embedding_size", 1, _MAX_WIDTH)
        depths = config.integers("depths", 1, _MAX_DEPTH)
        if len(config.integers("hidden_sizes", 1, _MAX_WIDTH)) != len(depths):
            raise config.error("hidden_sizes", f"one for each of the {len(depths)} stages")
        return read_image_preprocessing(source, None)

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return the channels of the last stage."""
        return int(model.config.hidden_sizes[-1])

    def embedding(self, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the mean of the last stage."""
        return cast(torch.Tensor, outputs.pooler_output.flatten(1))

    def logits(self, model: Any, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the head's output for that mean."""
        return cast(torch.Tensor, model.classifier(outputs.pooler_output))


FAMILY = ResNet()
