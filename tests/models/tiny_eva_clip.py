"""A tiny EVA-CLIP in BAAI's layout, with the tensors of an open_clip checkpoint."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import CLIPImageProcessorPil, CLIPTokenizerFast

from mmedge.specs import Array

__all__ = ["VISION", "renamed", "write_eva_clip"]

_CASES: Any = importlib.import_module("families.open_clip_cases")
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {
    **_BLOCKS,
    "intermediate_size": 128,
    "vocab_size": _CASES.ROWS,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-5,
}
VISION = {
    **_BLOCKS,
    "intermediate_size": 85,
    "image_size": _CASES.SIDE,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "k_bias": False,
    "use_rope": True,
    "use_swiglu_mlp": True,
    "use_sub_ln": True,
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.norm": "self_attn.inner_attn_ln",
    "attn.proj": "self_attn.out_proj",
    "attn.out_proj": "self_attn.out_proj",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "mlp.fc1_g": "mlp.fc1",
    "mlp.fc1_x": "mlp.fc2",
    "mlp.norm": "mlp.ffn_ln",
    "mlp.fc2": "mlp.fc3",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "visual.trunk.cls_token": "vision_model.embeddings.class_embedding",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.trunk.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual.trunk.norm.weight": "vision_model.post_layernorm.weight",
    "visual.trunk.norm.bias": "vision_model.post_layernorm.bias",
    "visual.trunk.head.weight": "visual_projection.weight",
    "visual.trunk.head.bias": "visual_projection.bias",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}


def renamed(given: dict[str, Array]) -> dict[str, Array]:
    """Return open_clip's tensors of the case `eva02` by BAAI's names."""
    made: dict[str, Array] = {"text_projection.weight": given["text.text_projection"].T}
    for name, tensor in given.items():
        if name in _WHOLE:
            flat = name.endswith(("cls_token", "pos_embed"))
            made[_WHOLE[name]] = tensor.reshape(tensor.shape[1:]) if flat else tensor
            continue
        for start, tower in (
            ("visual.trunk.blocks.", "vision_model"),
            ("text.transformer.resblocks.", "text_model"),
        ):
            if name.startswith(start):
                number, rest = name.removeprefix(start).split(".", maxsplit=1)
                place = f"{tower}.encoder.layers.{number}"
                if "in_proj" in rest:
                    ending = rest.removeprefix("attn.in_proj_")
                    for part, third in zip("qkv", np.split(tensor, 3), strict=True):
                        made[f"{place}.self_attn.{part}_proj.{ending}"] = third
                else:
                    inner, ending = rest.rsplit(".", maxsplit=1)
                    made[f"{place}.{_BLOCK[inner]}.{ending}"] = tensor
    made["vision_model.embeddings.class_embedding"] = made[
        "vision_model.embeddings.class_embedding"
    ].reshape(-1)
    return {name: np.asarray(tensor, order="C") for name, tensor in made.items()}


def write_eva_clip(folder: Path) -> Path:
    """Write the EVA-02 of open_clip's case `eva02` in BAAI's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    recorded = json.loads(_CASES.RECORDED.read_text("utf-8"))["eva02"]
    save_file(renamed(_CASES.tensors(recorded["shapes"])), folder / "model.safetensors")
    config = {
        "architectures": ["EvaCLIPModel"],
        "auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPModel"},
        "model_type": "clip",
        "projection_dim": _CASES.DIM,
        "text_config": _TEXT,
        "vision_config": VISION,
    }
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in _CASES.MERGES]
    tokens = [*letters, *(f"{each}</w>" for each in letters), *merged, "<|start|>", "<|end|>"]
    CLIPTokenizerFast(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in _CASES.MERGES],
        bos_token="<|start|>",  # noqa: S106
        eos_token="<|end|>",  # noqa: S106
        pad_token="<|end|>",  # noqa: S106
        unk_token="<|end|>",  # noqa: S106
        model_max_length=20,
    ).save_pretrained(folder)
    side = {"height": _CASES.SIDE, "width": _CASES.SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": _CASES.SIDE}, crop_size=side).save_pretrained(
        folder
    )
    return folder
