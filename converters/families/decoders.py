"""Causal language models with a KV cache: one graph for prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from mmedge.bundle.tensors import Feed, ProcessorFeed, StateFeed
from mmedge.converters.families.base import RoleSpec
from mmedge.specs import Axis, Compare, State, StateTensor, TensorSpec

__all__ = ["Decoder", "decoder_role"]

_BATCH = Axis(1, 1, 8)
_USUAL_PAST = 64
_SLIDING = "sliding_attention"


class Decoder(nn.Module):
    """A causal language model of transformers over a flat KV cache.

    Args:
        model: A `...ForCausalLM` (transformers is untyped). A layer with a sliding window keeps the
            whole past too, and sees a part of it.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        self.additive = model.config._attn_implementation == "eager"
        kinds = getattr(model.config, "layer_types", None) or ()
        every = not kinds and getattr(model.config, "sliding_window", None) is not None
        self.window = model.config.sliding_window if every or _SLIDING in kinds else None
        self.kinds = kinds

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logit_positions: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Continue each row.

        Args:
            input_ids: (batch, sequence) int64, the new tokens.
            attention_mask: (batch, past + sequence) int64, 0 where a row is padded (on the left).
            logit_positions: (batch, kept) int64, the new tokens whose logits are returned, counted
                back from the last; the first row stands for all.
            past: Key and value of each layer in turn, (batch, heads, past, head_dim) float32; an
                empty past is a prefill.

        Returns:
            Logits (batch, kept, vocabulary), then the past with the new keys and values joined
            to it.
        """
        held, new = past[0].shape[2], input_ids.shape[1]
        torch._check(attention_mask.shape[1] == held + new)  # type: ignore[no-untyped-call]
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        columns = torch.arange(held + new)
        rows = torch.arange(held, held + new)[:, None]
        # Padding sees itself: a row of the softmax that is all masked is NaN, or anything.
        shown = (attention_mask != 0)[:, None, None, :] | (columns == rows)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        whole = shown & (columns <= rows)
        masks: Any = self._form(whole)
        if self.window is not None:
            near = self._form(whole & (columns > rows - self.window))
            masks = {"full_attention": masks, _SLIDING: near} if self.kinds else near
        output = self.model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=positions.narrow(1, held, new),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=new - 1 - logit_positions[0],
        )
        layers = output.past_key_values.layers
        return (output.logits, *(part for one in layers for part in (one.keys, one.values)))

    def _form(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask in the form that the model's attention takes: bool, or added to scores."""
        if not self.additive:
            return mask
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def decoder_role(model: Any, *, processor: str = "text") -> RoleSpec:  # noqa: ANN401
    """Describe a causal language model.

    Args:
        model: A `...ForCausalLM` (transformers is untyped).
        processor: Makes the token ids and their mask.
    """
    config = model.config
    longest, vocabulary = int(config.max_position_embeddings), int(config.vocab_size)
    layers = range(int(config.num_hidden_layers))
    names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    with torch.inference_mode():  # heads of the cache: architectures differ in what they join to it
        one = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    heads, size = (int(one.past_key_values.layers[0].keys.shape[axis]) for axis in (1, 3))

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        batch, sequence, past = sizes["batch"], sizes["sequence"], sizes["past"]
        mask = torch.ones(batch, past + sequence, dtype=torch.int64)
        for row in range(batch):  # each text a token shorter than the one before
            mask[row, : min(row, past + sequence - 1)] = 0
        shape = (batch, heads, past, size)
        return {
            "input_ids": torch.randint(vocabulary, (batch, sequence), generator=generator),
            "attention_mask": mask,
            "logit_positions": torch.arange(sizes["kept"]).flip(0).expand(batch, -1).clone(),
            **{f"past.{name}": torch.randn(shape, generator=generator) for name in names},
        }

    def caches(kind: str, length: str) -> tuple[TensorSpec, ...]:
        shape = ("batch", heads, length, size)
        return tuple(TensorSpec(f"{kind}.{name}", np.dtype(np.float32), shape) for name in names)

    ids, past = np.dtype(np.int64), caches("past", "past")
    logits = TensorSpec("logits", np.dtype(np.float32), ("batch", "kept", vocabulary))
    feeds: dict[str, Feed] = dict.fromkeys((item.name for item in past), StateFeed())
    text = ProcessorFeed(processor=processor)
    return RoleSpec(
        module=Decoder(model),
        inputs=(
            TensorSpec("input_ids", ids, ("batch", "sequence")),
            TensorSpec("attention_mask", ids, ("batch", "past + sequence")),
            TensorSpec("logit_positions", ids, ("batch", "kept")),
            *past,
        ),
        outputs=(logits, *caches("present", "past + sequence")),
        sample=sample,
        trace_sizes={"batch": 2, "sequence": 4, "past": 5, "kept": 3},
        proof_sizes=tuple(
            {"batch": batch, "sequence": sequence, "past": past, "kept": kept}
            for batch, sequence, past, kept in (
                (1, 4, 0, 4),
                (3, 4, 0, 1),
                (1, 1, 5, 1),
                (3, 1, 4, 1),
                (2, 3, 2, 2),
            )
        ),
        axes={
            "batch": _BATCH,
            "sequence": Axis(1, 1, longest),
            "kept": Axis(1, 1, longest),
            "past": Axis(0, min(_USUAL_PAST, longest - 1), longest - 1),
        },
        feeds={"input_ids": text, "attention_mask": text, "logit_positions": text, **feeds},
        compare={"logits": Compare.TOKENS},
        state=State(
            tuple(
                StateTensor(f"past.{name}", f"present.{name}", "append", axis=2) for name in names
            ),
            length="past",
            capacity=longest,
            kept="kept",
        ),
    )
