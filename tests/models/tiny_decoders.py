"""Tiny decoder language models of random weights in transformers' own classes and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2TokenizerFast

TEXT_END = "<|endoftext|>"
CONTEXT = 64
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_GEMMA = {**_GROUPED, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# Class of transformers and its sizes, by name; the name begins with the architecture's.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoX", {**_SIZES, "rotary_pct": 0.5}),
    "falcon": ("Falcon", _SIZES),
    "falcon-new": (
        "Falcon",
        {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "llama": (
        "Llama",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, **_WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {**_GEMMA, **_WINDOW, "query_pre_attn_scalar": 16}),
}


# With these, 32 greedy tokens of each of PROMPTS hold 10 different ones or more.
SEEDS = {
    "gpt2": 9,
    "opt": 9,
    "gpt_neox": 3,
    "falcon": 1,
    "llama": 5,
    "mistral": 2,
    "qwen2": 3,
    "qwen3": 0,
    "gemma": 10,
    "gemma2": 6,
    "gemma3_text": 11,
    "falcon-new": 5,
}
PROMPTS = ("a red circle", "hello", "some more words than")


def write_decoder(name: str, folder: Path, *, seed: int | None = None) -> Path:
    """Write a decoder of DECODERS with a byte tokenizer, which has no padding token.

    Args:
        name: Of the architecture.
        folder: Where to write.
        seed: Of the weights; None for that of SEEDS.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), TEXT_END])}
    tokenizer = GPT2TokenizerFast(vocab=vocab, merges=[], model_max_length=CONTEXT)
    end = int(tokenizer.eos_token_id)
    stem, sizes = DECODERS[name]
    config_class = getattr(transformers, f"{stem}{'Text' * (stem == 'Gemma3')}Config")
    config = config_class(
        **sizes,
        vocab_size=len(tokenizer),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    head = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEEDS[name] if seed is None else seed)
        model = getattr(transformers, stem + head)(config)
        for part, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                # A table that is the head too must not make each token its own successor.
                parameter.normal_(0.0, 0.075 if "gemma" in name and "embed" in part else 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
