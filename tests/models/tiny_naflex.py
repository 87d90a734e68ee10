"""A tiny SigLIP 2 NaFlex."""

from __future__ import annotations

from pathlib import Path

import torch
from models.tiny_models import _TOWER, SIGLIP_CONTEXT, _spread
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
)

__all__ = ["BUDGET", "PATCH", "write_naflex"]

BUDGET, PATCH = 20, 8


def write_naflex(folder: Path, *, budget: int = BUDGET, seed: int = 0) -> Path:
    """Write a SigLIP 2 whose positions are a grid of 4 x 4, for up to `budget` patches of 8 x 8."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(97, 123))]
    tokenizer = Siglip2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        padding_side="right",
        model_input_names=["input_ids"],
        add_eos_token=True,
    )
    config = Siglip2Config(
        text_config={
            **_TOWER,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": SIGLIP_CONTEXT,
            "projection_size": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        vision_config={**_TOWER, "num_patches": 16, "patch_size": PATCH},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Siglip2Model(config)
        _spread(model)
        model.logit_scale.data.fill_(2.3)
        model.logit_bias.data.fill_(-10.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=budget).save_pretrained(folder)
    return folder
