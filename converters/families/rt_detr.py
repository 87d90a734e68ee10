"""RT-DETR, RT-DETR v2: boxes of fixed classes from convolutions and queries (Zhao et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.loading import load_model, read_architecture
from mmedge.converters.families.towers import IMAGE_BATCH, seeded
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.steps import Resize
from mmedge.specs import Compare, Task, TensorSpec

__all__ = ["RT_DETR", "RT_DETR_V2"]

_THRESHOLD = 0.5  # transformers' own default
_BEYOND = 1e4  # logit of an anchor outside the image: its sigmoid is 1, and fp16 holds it
_SHARPNESS = 4.0


class _Detector(nn.Module):
    """pixel_values (B, 3, H, W) -> summary (B, C, 5), logits (B, Q, C) and boxes (B, Q, 4).

    RTDetrForObjectDetection.forward at one size of images, which torch cannot export with a batch
    that varies.
    """

    anchors: torch.Tensor
    inside: torch.Tensor

    def __init__(self, model: Any, size: tuple[int, int]) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model.model
        strides = list(model.config.feat_strides)
        while len(strides) < model.config.num_feature_levels:
            strides.append(strides[-1] * 2)
        self.shapes = [tuple(-(-side // stride) for side in size) for stride in strides]
        anchors, inside = self.model.generate_anchors(tuple(self.shapes))
        self.register_buffer("anchors", anchors.clamp(max=_BEYOND), persistent=False)
        self.register_buffer("inside", inside.float(), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self.model
        source = self._source(pixel_values)
        memory = model.enc_output(self.inside * source)
        best = model.enc_score_head(memory).max(-1).values
        chosen = torch.topk(best, model.config.num_queries, dim=1).indices[..., None]
        points = model.enc_bbox_head(memory) + self.anchors
        points = points.gather(1, chosen.expand(-1, -1, 4))
        decoded = model.decoder(
            inputs_embeds=memory.gather(1, chosen.expand(-1, -1, memory.shape[-1])),
            encoder_hidden_states=source,
            reference_points=points,
            # Numbers of Python: v2 checks them, and the check would become part of the graph.
            spatial_shapes=np.array(self.shapes, object),
            spatial_shapes_list=self.shapes,
        )
        logits = decoded.intermediate_logits[:, -1]
        boxes = decoded.intermediate_reference_points[:, -1]
        return _summary(logits, boxes), logits, boxes

    def _source(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features of every level, (B, positions, D)."""
        model = self.model
        features = model.backbone.model(pixel_values).feature_maps
        projected = [
            project(each) for project, each in zip(model.encoder_input_proj, features, strict=True)
        ]
        encoded = list(model.encoder(projected).last_hidden_state)
        last = encoded[-1]
        encoded += [last] * (len(self.shapes) - len(encoded))
        levels = zip(model.decoder_input_proj, encoded, strict=True)
        flat = [project(each).flatten(2).transpose(1, 2) for project, each in levels]
        return torch.cat(flat, 1)


def _summary(logits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return of each class the largest logit and the mean box, weighted by logits: (B, C, 5).

    Queries stand in the order of scores that may be nearly equal, so processors that round
    otherwise order them otherwise. This says the same in any order.
    """
    weights = torch.softmax(logits * _SHARPNESS, dim=1).transpose(1, 2)
    return torch.cat([logits.max(dim=1).values[..., None], weights @ boxes], dim=-1)


class RtDetr:
    """RT-DETR, or v2, with any backbone that transformers loads from the checkpoint itself."""

    def __init__(self, name: str, model_class: str) -> None:
        self.name = name
        self._class = model_class

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this model type."""
        return source.model_type == self.name

    def load(self, source: Source) -> nn.Module:
        """Load the detector in fp32; an unreadable processor raises."""
        read_image_preprocessing(source, None)
        _labels(source)
        return load_model(source, model_class=self._class)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the only role and the classes."""
        detector, labels = cast(Any, model), _labels(source)
        processor = read_image_preprocessing(source, None)

        def reference(pixel_values: torch.Tensor) -> torch.Tensor:
            outputs = detector(pixel_values)
            return _summary(outputs.logits, outputs.pred_boxes)

        return ModelSpec(
            kind=DetectorKind(labels=labels, threshold=_THRESHOLD),
            tasks=(Task.OBJECT_DETECTION,),
            roles={"image_encoder": lambda: _role(detector, _size(processor), len(labels))},
            processors={"image": processor},
            references={"image_encoder": reference},
        )


def _labels(source: Source) -> tuple[str, ...]:
    """Return the names of the classes, one for each logit."""
    config = read_architecture(source)
    if config.learn_initial_query:
        raise source.fields.error("learn_initial_query", "false: transformers cannot run it")
    names = {int(key): str(name) for key, name in config.id2label.items()}
    if sorted(names) != list(range(len(names))) or not all(names.values()):
        raise SourceError(
            f"{source.fields.file}: id2label has the ids {sorted(names)[:8]}..., expected 0 to "
            f"{len(names) - 1}, each with a name. Correct it."
        )
    return tuple(names[each] for each in range(len(names)))


def _size(processor: ImageConfig) -> tuple[int, int]:
    resize = processor.find(Resize)
    assert resize is not None  # noqa: S101, the size is fixed
    return resize.height, resize.width


def _role(model: Any, size: tuple[int, int], classes: int) -> RoleSpec:  # noqa: ANN401
    float32, count = np.dtype(np.float32), int(model.config.num_queries)
    shape = ("batch", 3, *size)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):
            return {"pixel_values": torch.rand(sizes["batch"], *shape[1:])}

    return RoleSpec(
        module=_Detector(model, size),
        inputs=(TensorSpec("pixel_values", float32, shape),),
        outputs=(
            TensorSpec("summary", float32, ("batch", classes, 5)),
            TensorSpec("logits", float32, ("batch", count, classes)),
            TensorSpec("boxes", float32, ("batch", count, 4)),
        ),
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
        feeds={"pixel_values": ProcessorFeed(processor="image")},
        compare={
            "summary": Compare.VALUES,
            "logits": Compare.UNORDERED,
            "boxes": Compare.UNORDERED,
        },
    )


RT_DETR = RtDetr("rt_detr", "RTDetrForObjectDetection")
RT_DETR_V2 = RtDetr("rt_detr_v2", "RTDetrV2ForObjectDetection")
