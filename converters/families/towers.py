"""Modules, specifications and check inputs that dual-encoder families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator
from optimum.utils.normalized_config import NormalizedTextConfig, NormalizedVisionConfig
from torch import nn

from mmedge.bundle.kinds import ContrastiveHead, DualEncoderKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec, TapPoint
from mmedge.converters.families.loading import DUAL_ENCODER_TASK, load_model, read_part
from mmedge.converters.families.taps import block_tap, ends_at
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import load_tokenizer
from mmedge.preprocess.config import ImageConfig, ProcessorConfig, TextConfig
from mmedge.specs import Axis, Compare, Modality, Task, TensorSpec

__all__ = [
    "IMAGE_BATCH",
    "TEXT_BATCH",
    "ImageTextFamily",
    "TextEncoder",
    "Tower",
    "dual_encoder",
    "embedding_role",
    "image_role",
    "seeded",
    "text_role",
]

# Past these sizes a batch gains next to nothing on a CPU, and memory grows with it.
IMAGE_BATCH = Axis(1, 1, 8)
TEXT_BATCH = Axis(1, 1, 32)
_USUAL_TOKENS = 16  # of a caption or a label
_LAYERS = "tower.encoder.layers"  # blocks of transformers' towers


class _ImageEncoder(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "vision_model", model)
        self.projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.tower(pixel_values).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class TextEncoder(nn.Module):
    """input_ids and attention_mask, if any (B, T) int64 -> embedding (B, D), L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "text_model", model)
        self.projection = getattr(model, "text_projection", nn.Identity())

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode texts: ids and mask (B, T) int64 -> (B, D) float32."""
        pooled = self.tower(input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


@dataclass(frozen=True)
class Tower:
    """One encoder of a dual encoder.

    Attributes:
        role: Makes its role.
        processor: Its frozen preprocessing.
        reference: See ModelSpec.references; None where the source has no model to run.
        files: See ModelSpec.files.
    """

    role: Callable[[], RoleSpec]
    processor: ProcessorConfig
    reference: Callable[..., Any] | None
    files: Mapping[str, bytes] = field(default_factory=dict)


class ImageTextFamily(ABC):
    """A family of transformers with an image and a text tower: both, or one alone."""

    name: str

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this family or a tower of one."""
        towers = (f"{self.name}_{part}_model" for part in ("vision", "text"))
        return source.model_type in {self.name, *towers}

    def load(self, source: Source) -> nn.Module:
        """Load the class of both towers, or of the one, in fp32; unreadable files raise."""
        if self._has(source, "vision"):
            self.image_config(source)
        if self._has(source, "text"):
            self.text_config(source, load_tokenizer(source))
        return load_model(source, model_class=self.model_class(source))

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoders, projection and normalisation inside, and their scores."""
        untyped = cast(Any, model)
        dim = self.dim(untyped)
        towers = {}
        if self._has(source, "vision"):
            towers[Modality.IMAGE] = self.image_tower(source, untyped, dim)
        if self._has(source, "text"):
            towers[Modality.TEXT] = self.text_tower(source, untyped, dim)
        return dual_encoder(towers, dim, self.head(untyped) if len(towers) > 1 else None)

    @abstractmethod
    def model_class(self, source: Source) -> str | None:
        """Return the name of transformers' class; None for the usual one."""

    @abstractmethod
    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return D of the embedding."""

    def head(self, model: Any) -> ContrastiveHead:  # noqa: ANN401
        """Return how similarities become scores: by a softmax over labels."""
        return ContrastiveHead(activation="softmax", logit_scale=float(model.logit_scale.exp()))

    def image_config(self, source: Source) -> ImageConfig:
        """Return the preprocessing of images: the source's own."""
        side = read_part(source, "vision_config").integer("image_size", 1, 1 << 14)
        return read_image_preprocessing(source, side)

    @abstractmethod
    def text_config(self, source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
        """Return the preprocessing of texts."""

    @abstractmethod
    def text_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the text tower."""

    def _has(self, source: Source, part: str) -> bool:
        return source.model_type in {self.name, f"{self.name}_{part}_model"}

    def image_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the image tower, of one resolution."""
        config = getattr(model.config, "vision_config", model.config)
        return Tower(
            role=lambda: image_role(_ImageEncoder(model), config, dim),
            processor=self.image_config(source),
            reference=getattr(model, "get_image_features", model.forward),
        )


def dual_encoder(
    towers: Mapping[Modality, Tower], dim: int, head: ContrastiveHead | None
) -> ModelSpec:
    """Describe encoders of two modalities, or a single one.

    Args:
        towers: By modality.
        dim: D of the shared embedding space.
        head: Conversion of similarities to scores; None for a single encoder.
    """
    names = {modality: f"{modality.value}_encoder" for modality in towers}
    scored = () if head is None else (Task.ZERO_SHOT_CLASSIFICATION,)
    return ModelSpec(
        kind=DualEncoderKind(encoders=names, embedding_dim=dim, contrastive_head=head),
        tasks=(Task.RETRIEVAL, *scored),
        roles={names[modality]: tower.role for modality, tower in towers.items()},
        processors={modality.value: tower.processor for modality, tower in towers.items()},
        files={path: data for tower in towers.values() for path, data in tower.files.items()},
        references={
            names[modality]: tower.reference
            for modality, tower in towers.items()
            if tower.reference is not None
        },
    )


def embedding_role(  # noqa: PLR0913, what a role is made of
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    dim: int,
    *,
    processor: str,
    axes: Mapping[str, Axis],
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]],
    traced: Mapping[str, int] | None = None,
    proved: Sequence[Mapping[str, int]] = ({},),
    taps: Mapping[str, TapPoint] | None = None,
) -> RoleSpec:
    """Describe an encoder with one output `embedding` (batch, dim) float32, L2-normalised.

    Args:
        module: Takes the inputs, returns the embedding.
        inputs: Its inputs, all from one processor.
        dim: D of the embedding.
        processor: Name of the processor.
        axes: See RoleSpec.
        sample: See RoleSpec.
        traced: Sizes of the axes beside `batch` at which it is exported.
        proved: Further sizes of these axes, each checked at two sizes of the batch.
        taps: See RoleSpec.
    """
    return RoleSpec(
        module=module,
        inputs=inputs,
        outputs=(TensorSpec("embedding", np.dtype(np.float32), ("batch", dim)),),
        axes=axes,
        sample=sample,
        trace_sizes={"batch": 2, **(traced or {})},
        proof_sizes=tuple({"batch": batch, **sizes} for batch in (1, 3) for sizes in proved),
        feeds={item.name: ProcessorFeed(processor=processor) for item in inputs},
        compare={"embedding": Compare.ROWS},
        taps=taps or {},
    )


def image_role(module: nn.Module, config: Any, dim: int) -> RoleSpec:  # noqa: ANN401
    """Describe an image tower of fixed resolution.

    Args:
        module: pixel_values (B, 3, H, W) float32 -> embedding (B, dim) float32.
        config: The image tower's configuration (transformers is untyped).
        dim: D of the embedding.
    """
    normalized: Any = NormalizedVisionConfig(config)
    side = int(normalized.image_size)
    shape = ("batch", int(normalized.num_channels), side, side)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = DummyVisionInputGenerator(
            DUAL_ENCODER_TASK, normalized, batch_size=sizes["batch"]
        )
        with seeded(seed):
            # From [0, 1) to about the range that normalised pixels have.
            return {"pixel_values": generator.generate("pixel_values") * 4 - 2}

    return embedding_role(
        module,
        (TensorSpec("pixel_values", np.dtype(np.float32), shape),),
        dim,
        processor="image",
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        taps=_patches(module, config, side),
    )


def _patches(module: nn.Module, config: Any, side: int) -> dict[str, TapPoint]:  # noqa: ANN401
    """Return the tap of a vision transformer; none of convolutions, which have no patches."""
    if not hasattr(config, "patch_size"):
        return {}
    embeddings = getattr(getattr(module, "tower", None), "embeddings", None)
    count = (side // int(config.patch_size)) ** 2
    skip = int(hasattr(embeddings, "class_embedding"))
    return block_tap(module, _LAYERS, (count, int(config.hidden_size)), skip=skip)


def text_role(
    module: nn.Module,
    config: Any,  # noqa: ANN401
    dim: int,
    *,
    dynamic_sequence: bool,
    close: Callable[[torch.Tensor], None] | None = None,
    masked: bool = False,
    longest: int | None = None,
    end: int | None = None,
) -> RoleSpec:
    """Describe a text tower.

    Args:
        module: input_ids (B, T) int64, and attention_mask (B, T) int64 where it is masked ->
            embedding (B, dim) float32.
        config: The text tower's configuration (transformers is untyped).
        dim: D of the embedding.
        dynamic_sequence: T is a dynamic axis; otherwise it is always the longest.
        close: Writes the closing token into sampled ids (B, T), in place.
        masked: The module takes an attention mask.
        longest: Most tokens of a text; None for as many as the configuration has positions.
        end: The token that closes a text, for the mask of its states where no attention mask is
            taken; None offers no tap.
    """
    normalized: Any = NormalizedTextConfig(config)
    longest = longest or int(config.max_position_embeddings)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = DummyTextInputGenerator(
            DUAL_ENCODER_TASK,
            normalized,
            batch_size=sizes["batch"],
            sequence_length=sizes.get("sequence", longest),
        )
        with seeded(seed):
            ids = cast(torch.Tensor, generator.generate("input_ids"))
            lengths = torch.randint(1, ids.shape[1] + 1, (len(ids), 1))
        if close is not None:
            close(ids)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        return {"input_ids": ids, **({"attention_mask": mask} if masked else {})}

    axes = {"batch": TEXT_BATCH}
    sequences: list[dict[str, int]] = [{}]
    traced: dict[str, int] = {}
    if dynamic_sequence:
        axes["sequence"] = Axis(1, min(_USUAL_TOKENS, longest), longest)
        sequences = [{"sequence": n} for n in sorted({2, (longest + 1) // 2, longest})]
        traced = {"sequence": max(2, longest // 2)}
    shape = ("batch", "sequence" if dynamic_sequence else longest)
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return embedding_role(
        module,
        tuple(TensorSpec(name, np.dtype(np.int64), shape) for name in names),
        dim,
        processor="text",
        axes=axes,
        sample=sample,
        traced=traced,
        proved=sequences,
        taps={}
        if end is None
        else block_tap(module, _LAYERS, (shape[1], int(normalized.hidden_size)), mask=ends_at(end)),
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, which optimum's generators draw from, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
