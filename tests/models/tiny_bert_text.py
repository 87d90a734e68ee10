"""Tiny dual encoders whose text tower is a BERT, and MetaCLIP 2, in transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from models.tiny_models import _TOWER, CLIP_SIDE, _spread, clip_tokenizer, train_unigram

__all__ = ["MODELS", "write_model"]

_TEXT = {**_TOWER, "max_position_embeddings": 24}
_IMAGE = {**_TOWER, "image_size": CLIP_SIDE, "patch_size": 8}
_WORDS = "a red green blue yellow circle square star ring picture of 红 色 的 圆 ##s"


def _chinese_clip() -> Any:
    config = transformers.ChineseCLIPConfig(
        text_config={**_TEXT, "vocab_size": 64}, vision_config=_IMAGE, projection_dim=16
    )
    return transformers.ChineseCLIPModel(config)


def _altclip() -> Any:
    config = transformers.AltCLIPConfig(
        text_config={**_TEXT, "vocab_size": 64, "project_dim": 16},
        vision_config={**_IMAGE, "projection_dim": 16},
        projection_dim=16,
    )
    return transformers.AltCLIPModel(config)


def _align() -> Any:
    vision = {
        "image_size": CLIP_SIDE,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.2,
        "depth_divisor": 4,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "depthwise_padding": [],
        "hidden_dim": 8,
    }
    config = transformers.AlignConfig(
        text_config={**_TEXT, "vocab_size": 64}, vision_config=vision, projection_dim=8
    )
    return transformers.AlignModel(config)


def _metaclip_2() -> Any:
    tokenizer = clip_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.MetaClip2Config(
        text_config={**text, "pad_token_id": tokenizer.pad_token_id, "projection_dim": 16},
        vision_config={**_IMAGE, "projection_dim": 16},
        projection_dim=16,
    )
    return transformers.MetaClip2Model(config)


def _bert_tokenizer(folder: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS.split()]
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=20)


def _roberta_tokenizer(folder: Path) -> Any:
    (folder / "sentencepiece.bpe.model").write_bytes(train_unigram([_WORDS] * 20, 48))
    return transformers.XLMRobertaTokenizerFast.from_pretrained(folder)


_SIDE = {"height": CLIP_SIDE, "width": CLIP_SIDE}
_SQUARE = {"size": _SIDE, "do_center_crop": False}
_CROPPED = {"size": {"shortest_edge": CLIP_SIDE}, "crop_size": _SIDE}
_EFFICIENT = _SQUARE | {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}
MODELS: dict[str, Any] = {
    "align": (_align, _bert_tokenizer, "EfficientNetImageProcessorPil", _EFFICIENT),
    "altclip": (_altclip, _roberta_tokenizer, "CLIPImageProcessorPil", _CROPPED),
    "chinese_clip": (_chinese_clip, _bert_tokenizer, "ChineseCLIPImageProcessorPil", _SQUARE),
    "metaclip_2": (_metaclip_2, lambda _: clip_tokenizer(), "CLIPImageProcessorPil", _CROPPED),
}
"""Of a family: its model, tokenizer, and image processor with settings."""


def write_model(name: str, folder: Path) -> Path:
    """Write the tiny model of a family, its tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    make, tokenizer, processor, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        _spread(model)
    model.save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return folder
