"""A CLIP of 1.7 million weights in transformers' own classes, and its training passes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from dataset import IMAGE_SIZE, PATCH_SIZE
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
)
from vocabulary import MAX_TOKENS

WIDTH = 128
_HEADS = 4
_VISION_LAYERS, _TEXT_LAYERS = 5, 3
_EARLY_LAYERS = 3
"""The image layers after which patches are named in training."""


def build_model(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    """Return an untrained model whose special ids are the tokenizer's true ones.

    The true end id matters: with the library's default of 2 the text tower pools by a legacy rule.
    """
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": _HEADS}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=_TEXT_LAYERS,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        **size,
        **ids,
    )
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_hidden_layers=_VISION_LAYERS,
        projection_dim=WIDTH,
        **size,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
    )
    model = CLIPModel(config)
    _start_local(model)
    # On a CPU the plain attention's backward pass is several times faster than the fused one's.
    model.set_attn_implementation("eager")
    return model


def _start_local(model: CLIPModel) -> None:
    """Let each patch look at its neighbours from the start, which small data teaches slowly.

    Positions begin as sines and cosines of row and column, and keys begin equal to queries, so
    that attention begins as similarity of content and place.
    """
    side, quarter = IMAGE_SIZE // PATCH_SIZE, WIDTH // 4
    angles = torch.arange(side)[:, None] / 6.0 ** (torch.arange(quarter) / quarter * 2.0)
    waves = 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    vision = model.vision_model
    with torch.no_grad():
        places = torch.cat([rows, columns], dim=2).flatten(0, 1)
        vision.embeddings.position_embedding.weight[1:].copy_(places)
        for layer in vision.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(2.0)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def image_processor() -> CLIPImageProcessorPil:
    """Return the preprocessing that goes with the model: CLIP's own at 64 pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)


def embed_images(
    model: CLIPModel, pixels: torch.Tensor, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed images, from all their patches or some.

    Args:
        model: The model whose image tower runs.
        pixels: (B, 3, 64, 64).
        kept: (B, K) int64, the patches to look at; None for all 64.

    Returns:
        Embeddings (B, D), float32, L2-normalised, and the early patches (B, K, W).
    """
    vision = model.vision_model
    hidden = early_states(model, pixels, kept)
    early = hidden[:, 1:]
    for layer in vision.encoder.layers[_EARLY_LAYERS:]:
        hidden = layer(hidden, None)
    pooled = vision.post_layernorm(hidden[:, 0])
    vectors = model.visual_projection(pooled).float()
    return torch.nn.functional.normalize(vectors, dim=-1), early


def early_states(model: CLIPModel, pixels: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Return the class token and the kept patches (B, 1 + K, W) after the first layers."""
    vision = model.vision_model
    hidden: torch.Tensor = vision.embeddings(pixels)
    if kept is not None:
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.pre_layrnorm(hidden)
    for layer in vision.encoder.layers[:_EARLY_LAYERS]:
        hidden = layer(hidden, None)
    return hidden


def embed_tokens(model: CLIPModel, tokens: torch.Tensor, parts: int = 3) -> torch.Tensor:
    """Return embeddings (B, D), float32, normalised, of token rows padded with the end token.

    Rows run in groups of similar length; the tower is causal and reads the first end token, so
    what is cut off behind it never counted.
    """
    end = int(model.config.text_config.eos_token_id)
    lengths = (tokens != end).sum(dim=1) + 1
    order = lengths.argsort()
    groups = []
    for rows in order.chunk(parts):
        # Few distinct shapes: the CPU kernels are generated anew for each.
        longest = -(-int(lengths[rows].max()) // 8) * 8
        pooled = model.text_model(input_ids=tokens[rows, :longest]).pooler_output
        groups.append(model.text_projection(pooled))
    vectors = torch.cat(groups)[order.argsort()].float()
    return torch.nn.functional.normalize(vectors, dim=-1)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Return the symmetric cross-entropy of a batch. Embeddings (B, D), scale a log."""
    logits = texts @ images.T * logit_scale.exp()
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def to_pixels(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Normalise as the image processor does: (B, H, W, 3) uint8 to (B, 3, H, W) bfloat16."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean, dtype=torch.float32)
    std = torch.tensor(processor.image_std, dtype=torch.float32)
    scaled = (torch.from_numpy(images).float() / 255.0 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous().bfloat16()
