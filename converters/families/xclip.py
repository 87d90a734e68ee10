"""X-CLIP: frames that exchange messages, labels adapted to the video (Ni et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.tensors import RoleFeed
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.clip_text import ClipFamily
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import Tower, dual_encoder, embedding_role, seeded
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import load_tokenizer
from mmedge.preprocess.config import VideoConfig
from mmedge.specs import Axis, Compare, Modality, TensorSpec

__all__ = ["FAMILY"]

_VIDEO_BATCH = Axis(1, 1, 4)
_LABELS = Axis(1, 16, 256)
_FLOAT32 = np.dtype(np.float32)
_PROMPTER = "text_prompter"


class _VideoEncoder(nn.Module):
    """pixel_values (B, F, 3, H, W) float32 -> embedding (B, D), context (B, P, D) float32.

    The embedding is L2-normalised; the context is what the prompter reads: the projected patches,
    each averaged over the frames.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower, self.projection = model.vision_model, model.visual_projection
        self.integration = model.mit
        self.norm, self.weight = model.prompts_visual_layernorm, model.prompts_visual_projection

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = pixel_values.shape[1]
        seen = self.tower(pixel_values.flatten(0, 1))
        of_frames = self.projection(seen.pooler_output).unflatten(0, (-1, frames))
        embedding = self.integration(of_frames).pooler_output
        patches = self.norm(seen.last_hidden_state[:, 1:]) @ self.weight
        return functional.normalize(embedding, dim=-1), patches.unflatten(0, (-1, frames)).mean(1)


class _TextEncoder(nn.Module):
    """input_ids (B, T) int64 -> embedding (B, D), L2-normalised, and projected (B, D), before."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower, self.projection = model.text_model, model.text_projection

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self.projection(self.tower(input_ids).pooler_output)
        return functional.normalize(projected, dim=-1), projected


class _Prompter(nn.Module):
    """projected (L, D), context (B, P, D) float32 -> embedding (B, L, D) float32, L2-normalised."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, projected: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        texts = projected.unsqueeze(0).expand(context.shape[0], -1, -1)
        return functional.normalize(texts + self.generator(texts, context), dim=-1)


class XClip(ClipFamily):
    """X-CLIP of transformers: both towers and the prompter."""

    name = "xclip"
    class_prefix = "XCLIP"
    pools_at_highest = True

    def matches(self, source: Source) -> bool:
        """Return whether a source is an X-CLIP."""
        return source.model_type == self.name

    def load(self, source: Source) -> nn.Module:
        """Load XCLIPModel in fp32; unreadable processors raise."""
        _video_config(source)
        self.text_config(source, load_tokenizer(source))
        return load_model(source, model_class="XCLIPModel")

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoders, the prompter, and softmax over labels."""
        xclip = cast(Any, model)
        dim = int(xclip.config.projection_dim)
        text = self.text_tower(source, xclip, dim)
        towers = {
            Modality.VIDEO: Tower(
                role=lambda: _video_role(xclip, dim),
                processor=_video_config(source),
                reference=xclip.get_video_features,
            ),
            Modality.TEXT: replace(text, role=lambda: _text_role(text.role(), xclip, dim)),
        }
        spec = dual_encoder(towers, dim, self.head(xclip))
        kind = cast(DualEncoderKind, spec.kind).model_copy(update={"prompter": _PROMPTER})
        prompter = {_PROMPTER: lambda: _prompter_role(xclip, dim)}
        return replace(spec, kind=kind, roles={**spec.roles, **prompter})


def _video_config(source: Source) -> VideoConfig:
    """Return the source's own preprocessing of each frame."""
    vision = read_part(source, "vision_config")
    frame = read_image_preprocessing(source, vision.integer("image_size", 1, 1 << 14))
    frames = vision.integer("num_frames", 1, 1 << 10)
    return VideoConfig(input=frame.input, frames=frames, steps=frame.steps)


def _video_role(xclip: Any, dim: int) -> RoleSpec:  # noqa: ANN401
    vision = xclip.config.vision_config
    side = int(vision.image_size)
    shape = (int(vision.num_frames), 3, side, side)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):
            return {"pixel_values": torch.rand(sizes["batch"], *shape) * 4 - 2}

    role = embedding_role(
        _VideoEncoder(xclip),
        (TensorSpec("pixel_values", _FLOAT32, ("batch", *shape)),),
        dim,
        processor="video",
        axes={"batch": _VIDEO_BATCH},
        sample=sample,
    )
    patches = (side // int(vision.patch_size)) ** 2
    return _with_output(role, TensorSpec("context", _FLOAT32, ("batch", patches, dim)))


def _text_role(role: RoleSpec, xclip: Any, dim: int) -> RoleSpec:  # noqa: ANN401
    named = replace(role, module=_TextEncoder(xclip))
    return _with_output(named, TensorSpec("projected", _FLOAT32, ("batch", dim)))


def _with_output(role: RoleSpec, output: TensorSpec) -> RoleSpec:
    compare = {**role.compare, output.name: Compare.ROWS}
    return replace(role, outputs=(*role.outputs, output), compare=compare)


def _prompter_role(xclip: Any, dim: int) -> RoleSpec:  # noqa: ANN401
    vision = xclip.config.vision_config
    patches = (int(vision.image_size) // int(vision.patch_size)) ** 2

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):
            return {
                "projected": torch.randn(sizes["labels"], dim),
                "context": torch.randn(sizes["batch"], patches, dim),
            }

    return RoleSpec(
        module=_Prompter(xclip.prompts_generator),
        inputs=(
            TensorSpec("projected", _FLOAT32, ("labels", dim)),
            TensorSpec("context", _FLOAT32, ("batch", patches, dim)),
        ),
        outputs=(TensorSpec("embedding", _FLOAT32, ("batch", "labels", dim)),),
        axes={"labels": _LABELS, "batch": _VIDEO_BATCH},
        sample=sample,
        trace_sizes={"labels": 3, "batch": 2},
        proof_sizes=({"labels": 1, "batch": 1}, {"labels": 5, "batch": 3}),
        feeds={
            "projected": RoleFeed(role="text_encoder", output="projected"),
            "context": RoleFeed(role="video_encoder", output="context"),
        },
        compare={"embedding": Compare.ROWS},
    )


FAMILY = XClip()
