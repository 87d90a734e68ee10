"""What families of transformers' image models share: an encoder, with or without classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import ClassHead, EncoderKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import IMAGE_BATCH, seeded
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.image import ImageProcessor
from mmedge.specs import Compare, Modality, Task, TensorSpec

__all__ = ["ImageModelFamily"]

_ROLE = "image_encoder"
_CLASSIFIER = "ForImageClassification"
_MAX_LABEL, _MAX_LABELS = 10_000, 1 << 17
_ACTIVATIONS: Mapping[object, str] = {
    None: "softmax",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}


class _ImageModel(nn.Module):
    """pixel_values (B, 3, H, W) -> embedding (B, D) L2-normalised, and logits (B, L) if any."""

    def __init__(self, family: ImageModelFamily, model: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.family = family
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.model.base_model(pixel_values)
        embedding = nn.functional.normalize(self.family.embedding(outputs), dim=-1)
        if not hasattr(self.model, "classifier"):
            return embedding
        return embedding, self.family.logits(self.model, outputs)


class ImageModelFamily(ABC):
    """A family of image models of transformers: the encoder alone, or with its class head."""

    name: str
    classes: Mapping[str, str]
    """Prefix of transformers' classes by `model_type`: "ViT" of ViTModel."""
    head: str = "classifier.weight"
    """The head's weight, (L, width)."""

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this family."""
        return source.model_type in self.classes

    def load(self, source: Source) -> nn.Module:
        """Load the encoder, or the classifier where the weights have its head, in fp32."""
        head = read_class_head(source, self.head)
        self.image_config(source)
        name = self.classes[source.model_type] + ("Model" if head is None else _CLASSIFIER)
        options = self.options(source) if head is None else {}
        return load_model(source, model_class=name, options=options)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoder, normalisation inside, and its classes."""
        whole = cast(Any, model)
        processor = self.image_config(source)
        size = cast("tuple[int, int]", ImageProcessor(processor).output_size)
        head = read_class_head(source, self.head)
        module = _ImageModel(self, self.fitted(whole, size))
        dim = self.dim(whole)

        def reference(pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            embedding = self.embedding(whole.base_model(pixel_values))
            return (embedding, whole(pixel_values).logits) if head else (embedding,)

        return ModelSpec(
            kind=EncoderKind(encoders={Modality.IMAGE: _ROLE}, embedding_dim=dim, class_head=head),
            tasks=(Task.RETRIEVAL, *((Task.IMAGE_CLASSIFICATION,) if head else ())),
            roles={_ROLE: lambda: _role(module, size, dim, len(head.labels) if head else None)},
            processors={"image": processor},
            references={_ROLE: reference},
        )

    def image_config(self, source: Source) -> ImageConfig:
        """Return the source's own preprocessing, which gives the size that the model takes."""
        side = read_part(source, "vision_config").integer("image_size", 1, 1 << 14)
        return read_image_preprocessing(source, side)

    def options(self, source: Source) -> Mapping[str, Any]:  # noqa: ARG002, of some families
        """Return the arguments of the encoder's class that its weights decide."""
        return {}

    def fitted(self, model: Any, size: tuple[int, int]) -> Any:  # noqa: ANN401, ARG002
        """Return the model, made ready for images of one size (height, width)."""
        return model

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return D of the embedding."""
        return int(model.config.hidden_size)

    @abstractmethod
    def embedding(self, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the embedding (B, D) of the encoder's outputs, not normalised."""

    @abstractmethod
    def logits(self, model: Any, outputs: Any) -> torch.Tensor:  # noqa: ANN401
        """Return the logits (B, L) of a classifier from its encoder's outputs."""


def read_class_head(source: Source, weight: str) -> ClassHead | None:
    """Return the labels of a classification head, None where the checkpoint has none.

    Args:
        source: The source.
        weight: Name of the head's weight, (L, width).

    Raises:
        SourceError: If config.json names other classes than the weights hold, or scores that are
            no classes.
    """
    config = source.fields
    if weight not in source.shapes:
        architectures = config.values.get("architectures")
        if isinstance(architectures, list) and any(
            str(name).endswith(_CLASSIFIER) for name in architectures
        ):
            raise config.error("architectures", f"no {_CLASSIFIER}: the checkpoint has no {weight}")
        return None
    count = source.shapes[weight][0]
    if count > _MAX_LABELS:
        raise config.error("id2label", f"at most {_MAX_LABELS} classes, the checkpoint has {count}")
    labels = config.section("id2label")
    if labels is None:
        raise config.error("id2label", f"a label for each of the {count} classes")
    if set(labels.values) != {str(index) for index in range(count)}:
        raise config.error(
            "id2label",
            f"the {count} classes that {weight} has, from '0' to '{count - 1}'",
            "Fetch config.json and weights of one revision.",
        )
    names = tuple(labels.text(str(index)) for index in range(count))
    for index, name in enumerate(names):
        if len(name) > _MAX_LABEL:
            raise labels.error(str(index), f"at most {_MAX_LABEL} characters")
    activation = config.choice("problem_type", _ACTIVATIONS)
    return ClassHead(labels=names, activation=activation)


def _role(module: nn.Module, size: tuple[int, int], dim: int, classes: int | None) -> RoleSpec:
    float32 = np.dtype(np.float32)
    shape = ("batch", 3, *size)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):  # about the range that normalised pixels have
            return {"pixel_values": torch.rand(sizes["batch"], *shape[1:]) * 4 - 2}

    logits = () if classes is None else (TensorSpec("logits", float32, ("batch", classes)),)
    return RoleSpec(
        module=module,
        inputs=(TensorSpec("pixel_values", float32, shape),),
        outputs=(TensorSpec("embedding", float32, ("batch", dim)), *logits),
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
        feeds={"pixel_values": ProcessorFeed(processor="image")},
        compare={"embedding": Compare.ROWS, **({"logits": Compare.TOKENS} if logits else {})},
    )
