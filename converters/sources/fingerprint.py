"""Fingerprints of loaded weights and of the configuration that computes with them."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["computing_config", "tensors_sha256"]

# Sizes that the shapes of the tensors show already.
_SHOWN_BY_SHAPES = {
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "projection_dim",
    "projection_size",
    "vocab_size",
}
# Bookkeeping, training and generation. Padding is part of the preprocessing.
_NOT_COMPUTING = {
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}
_TRAINING = ("dropout", "initializer_range", "initializer_factor", "_init_value")


def tensors_sha256(model: nn.Module) -> str:
    """Return one sha256 over the names, dtypes, shapes and content of a model's tensors.

    Tensors are hashed where they lie, in the order of their names, so how a checkpoint is split
    into files does not matter. The model's own top-level scalars (`logit_scale`, `logit_bias`) are
    left out: they turn similarities into scores and are not part of an embedding.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "." not in name and tensor.numel() == 1:
            continue
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def computing_config(config: Any) -> dict[str, object]:  # noqa: ANN401, transformers is untyped
    """Return the computing configuration of a loaded model, beyond its tensors.

    Args:
        config: A configuration of transformers, defaults resolved.

    Returns:
        Activation, epsilon, heads, patch and so on, by key, nested as in `config`. Keys that the
        class does not read and values equal to its defaults are left out, so a default that is
        written out, or one that a later version adds, changes nothing.
    """
    found: dict[str, object] = {}
    for name, field in inspect.signature(type(config)).parameters.items():
        if name in _SHOWN_BY_SHAPES | _NOT_COMPUTING or name.endswith(_TRAINING):
            continue
        value = getattr(config, name, field.default)
        if hasattr(value, "to_dict"):
            found[name] = computing_config(value)
        elif value != field.default:
            found[name] = value
    return {key: value for key, value in found.items() if value != {}}
