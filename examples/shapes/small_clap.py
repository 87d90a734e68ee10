"""A CLAP of 1.1 million weights in transformers' own classes, and a tokenizer for it."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from sound_dataset import MELS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import ClapConfig, ClapModel, RobertaTokenizerFast

MAX_TOKENS = 64
"""Context length: the longest caption takes 62 tokens, start and end included."""
DIM = 128
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def build_tokenizer(texts: Iterable[str], merge_count: int = 400) -> RobertaTokenizerFast:
    """Learn merges from texts and return a byte-level tokenizer laid out as RoBERTa's."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merge_count, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learnt: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    merges = [(left, right) for left, right in learnt]
    tokens = dict.fromkeys([*_SPECIAL, *alphabet, *(left + right for left, right in merges)])
    vocab = {token: index for index, token in enumerate(tokens)}
    return RobertaTokenizerFast(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_model(tokenizer: RobertaTokenizerFast) -> ClapModel:
    """Return an untrained model: 256 patches of 64 ms and eight mels, three stages."""
    audio = {
        "num_mel_bins": MELS,
        "spec_size": 128,
        "patch_size": 8,
        "patch_stride": [8, 8],
        "window_size": 4,
        "patch_embeds_hidden_size": 32,
        "hidden_size": 128,
        "depths": [2, 2, 2],
        "num_attention_heads": [2, 4, 8],
        "num_hidden_layers": 3,
        "hidden_dropout_prob": 0.0,
        "enable_fusion": False,
    }
    text = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS + 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=DIM))


def fix_norm(model: ClapModel, mels: torch.Tensor) -> None:
    """Give the first layer the statistics of all data, and leave it out of training.

    So no gradient runs back through the interpolation behind it, which is slow on a CPU.

    Args:
        model: The untrained model.
        mels: (N, frames, mels) float32, decibels.
    """
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.copy_(mels.mean(dim=(0, 1)))
    norm.running_var.copy_(mels.var(dim=(0, 1)))
    norm.requires_grad_(requires_grad=False)


def set_training(model: ClapModel, *, training: bool) -> None:
    """Switch training on or off, with the first layer as ``fix_norm`` left it."""
    model.train(training)
    model.audio_model.audio_encoder.batch_norm.eval()


def pooled_sounds(model: ClapModel, features: torch.Tensor) -> torch.Tensor:
    """Return what the audio projection takes, (B, 128), of spectrograms (B, 1, frames, mels)."""
    pooled: torch.Tensor = model.audio_model.audio_encoder(features).pooler_output
    return pooled


def pooled_texts(model: ClapModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the text projection takes, and the mean of the tokens behind it.

    Args:
        model: The model whose text tower runs.
        tokens: (B, T) int64, padded.

    Returns:
        Both (B, 128).
    """
    mask = (tokens != model.config.text_config.pad_token_id).long()
    output = model.text_model(tokens, attention_mask=mask)
    states, shown = output.last_hidden_state, mask[..., None]
    return output.pooler_output, (states * shown).sum(dim=1) / shown.sum(dim=1)
