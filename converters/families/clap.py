"""CLAP: an audio transformer over log-mel spectrograms, and a RoBERTa (Wu et al., 2023)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import (
    TextEncoder,
    Tower,
    dual_encoder,
    embedding_role,
    seeded,
    text_role,
)
from mmedge.converters.sources.reference_audio import read_audio_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
    tokenizer_fields,
)
from mmedge.errors import SourceError
from mmedge.preprocess.config import AudioConfig, TextConfig
from mmedge.specs import Axis, Modality, TensorSpec

__all__ = ["FAMILY"]

_AUDIO_BATCH = Axis(1, 1, 8)
_FUSED_CHANNELS = 4  # the whole, shrunk, and three windows of it


class _AudioEncoder(nn.Module):
    """input_features (B, C, frames, mels) float32 -> embedding (B, D) float32, L2-normalised.

    C is 1, or 4 where the model fuses windows of long audio. The source's own processor then fuses
    every sound that is alone in its batch, long or not, and so does this encoder: it needs no
    is_longer.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.projection = model.audio_projection
        # A copy that shares the weights: the source's own model stays as it is.
        shared = {id(weight): weight for weight in model.audio_model.parameters()}
        self.tower = copy.deepcopy(model.audio_model.audio_encoder, shared)
        if self.tower.enable_fusion:
            self.tower.enable_fusion = False
            self.tower.patch_embed = _FusedPatches(self.tower.patch_embed)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        pooled = self.tower(input_features).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class _FusedPatches(nn.Module):
    """ClapAudioPatchEmbed with every sound fused, where the original selects rows by is_longer."""

    def __init__(self, original: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.original = original

    def forward(self, channels: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        whole = self.original.proj(channels[:, :1])
        height, width = channels.shape[2:]
        windows = self.original.mel_conv2d(channels[:, 1:].reshape(-1, 1, height, width))
        windows = windows.unflatten(0, (-1, _FUSED_CHANNELS - 1))
        windows = windows.permute(0, 2, 3, 1, 4).flatten(3)
        windows = nn.functional.pad(windows, (0, whole.shape[-1] - windows.shape[-1]))
        fused = self.original.fusion_model(whole, windows)
        return cast(torch.Tensor, self.original.norm(fused.flatten(2).transpose(1, 2)))


class Clap:
    """The CLAP family of transformers, with or without fusion of long audio."""

    name = "clap"

    def matches(self, source: Source) -> bool:
        """Tell whether a source is a CLAP."""
        return source.model_type == "clap"

    def load(self, source: Source) -> nn.Module:
        """Load ClapModel in fp32."""
        return load_model(source, model_class="ClapModel")

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoders, projection and normalisation inside, and softmax over labels."""
        clap = cast(Any, model)
        dim = int(clap.config.projection_dim)
        towers = {
            Modality.AUDIO: _audio_tower(source, clap, dim),
            Modality.TEXT: _text_tower(source, clap, dim),
        }
        # logit_scale_a scales the scores of a sound's labels; logit_scale_t those of a text.
        scale = float(clap.logit_scale_a.exp())
        return dual_encoder(towers, dim, ContrastiveHead(activation="softmax", logit_scale=scale))


def _audio_tower(source: Source, clap: Any, dim: int) -> Tower:  # noqa: ANN401
    processor = read_audio_preprocessing(source)
    fused = processor.length.truncate == "fusion"
    frames = processor.length.samples // processor.log_mel.hop + 1
    _check_spectrogram(source, processor, frames)
    channels = _FUSED_CHANNELS if fused else 1
    shape = ("batch", channels, frames, processor.log_mel.mels)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):  # about the range of decibels that a sound has
            return {processor.input: torch.randn(sizes["batch"], *shape[1:]) * 20 - 30}

    def role() -> RoleSpec:
        return embedding_role(
            _AudioEncoder(clap),
            (TensorSpec(processor.input, np.dtype(np.float32), shape),),
            dim,
            processor="audio",
            axes={"batch": _AUDIO_BATCH},
            sample=sample,
        )

    return Tower(role=role, processor=processor, reference=clap.get_audio_features)


def _check_spectrogram(source: Source, processor: AudioConfig, frames: int) -> None:
    """Check that the feature extractor gives what the audio tower takes."""
    audio = read_part(source, "audio_config")
    fuses = audio.flag("enable_fusion")
    if fuses and audio.values.get("fusion_type") == "channel_map":
        raise audio.error("fusion_type", "aff_2d: transformers has no other")
    mels = audio.integer("num_mel_bins", 1, 1 << 10)
    side = audio.integer("spec_size", mels, 1 << 14)
    expected = (mels, fuses)
    got = (processor.log_mel.mels, processor.length.truncate == "fusion")
    longest = side * (side // mels)
    if got != expected or frames > longest:
        raise SourceError(
            f"{source.name}: preprocessor_config.json gives {frames} frames of {got[0]} mels, "
            f"fusion {got[1]}; the model takes up to {longest} frames of {mels} mels, fusion "
            f"{fuses}. Fetch both files of one model."
        )


def _text_tower(source: Source, clap: Any, dim: int) -> Tower:  # noqa: ANN401
    tokenizer = load_tokenizer(source)
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    # RoBERTa's positions begin behind the row of the padding token.
    first = text.integer("pad_token_id", 0, rows - 1) + 1
    context = text.integer("max_position_embeddings", first + 1, 1 << 20) - first
    processor = TextConfig(
        max_length=longest_text(source, tokenizer, context),
        padding="longest",
        attention_mask="attention_mask",
        pad_id=tokenizer_fields(source, tokenizer).integer("pad_token_id", 0, rows - 1),
    )
    config = copy.copy(clap.config.text_config)
    config.max_position_embeddings = context
    return Tower(
        role=lambda: text_role(TextEncoder(clap), config, dim, dynamic_sequence=True, masked=True),
        processor=processor,
        reference=clap.get_text_features,
        files={"tokenizer.json": backend_json(source, tokenizer).encode()},
    )


FAMILY = Clap()
