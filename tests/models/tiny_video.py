"""A tiny X-CLIP, and videos for it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from models.tiny_models import _TOWER, CLIP_CONTEXT, CLIP_SIDE, _spread, clip_tokenizer
from transformers import (
    VideoMAEImageProcessorPil,
    XCLIPConfig,
    XCLIPModel,
)

from mmedge.specs import Array

__all__ = ["FRAMES", "moving", "write_video", "write_xclip"]

FRAMES = 4


def write_xclip(folder: Path, *, seed: int = 0) -> Path:
    """Write an X-CLIP of four frames a video, with a byte tokenizer."""
    tokenizer = clip_tokenizer()
    mit = {"mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_hidden_layers": 1}
    config = XCLIPConfig(
        text_config={
            **_TOWER,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CLIP_CONTEXT,
            "bos_token_id": int(tokenizer.bos_token_id),
            "eos_token_id": int(tokenizer.eos_token_id),
            "pad_token_id": int(tokenizer.pad_token_id),
        },
        vision_config={
            **_TOWER,
            **mit,
            "mit_num_attention_heads": 2,
            "image_size": CLIP_SIDE,
            "patch_size": 8,
            "num_frames": FRAMES,
        },
        projection_dim=32,
        prompt_layers=1,
        prompt_num_attention_heads=2,
        prompt_alpha=0.4,  # so that it shows
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XCLIPModel(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VideoMAEImageProcessorPil(
        size={"shortest_edge": CLIP_SIDE}, crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE}
    ).save_pretrained(folder)
    return folder


def moving(seed: int, frames: int = FRAMES) -> Array:
    """Return frames of coarse noise that moves sideways: (frames, 48, 64, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = coarse.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(image, (3 + seed) * number, axis=1) for number in range(frames)])


def write_video(path: Path, frames: Array) -> Path:
    """Write frames (N, 48, 64, 3) as an MPEG-4 file of 20 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
