"""Beam search finds what transformers' finds, for two families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from models.tiny_decoders import PROMPTS, write_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmedge.closing import Closing
from mmedge.converters.families.decoders import Decoder
from mmedge.converters.quiet import quiet_libraries
from mmedge.generation.beam import beam_search
from mmedge.generation.decoding import Decoding
from mmedge.generation.options import GenerationOptions
from mmedge.runtimes.session import Session
from mmedge.specs import Array, State


class ModuleRun(Closing):
    """A decoder of torch as a session and its run."""

    def __init__(self, model: Any) -> None:
        self.module, self.model = Decoder(model), model
        self.past: list[torch.Tensor] = []

    @property
    def length(self) -> int:
        return self.past[0].shape[2]

    def start(self, _state: State, *, batch: int = 1, **_other: Any) -> ModuleRun:
        one = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
        for layer in one.past_key_values.layers:
            heads, size = layer.keys.shape[1], layer.keys.shape[3]
            self.past += [torch.zeros(batch, heads, 0, size)] * 2
        return self

    def step(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        names = ("input_ids", "attention_mask", "logit_positions")
        inputs = [torch.tensor(feed[name]) for name in names]
        with torch.inference_mode():
            logits, *self.past = self.module(*inputs, *self.past)
        return {"logits": logits.numpy()}

    def reorder(self, rows: Array) -> None:
        self.past = [tensor[torch.tensor(rows)] for tensor in self.past]

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"beams": 3}, ()),
        ({"beams": 4, "length_penalty": 0.0}, (40, 80, 98)),
        ({"beams": 2, "length_penalty": 2.0}, (70, 71, 72, 73, 74)),
    ],
)
def test_the_best_beam(
    name: str, options: dict[str, Any], ends: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_decoder(name, tmp_path / name)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text).input_ids for text in PROMPTS]
    pad = int(tokenizer.eos_token_id)
    longest = max(map(len, rows))
    made = model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
        max_new_tokens=12,
        do_sample=False,
        num_beams=options["beams"],
        length_penalty=options.get("length_penalty", 1.0),
        pad_token_id=pad,
        eos_token_id=[pad, *ends],
    )[:, longest:]
    expected = [[int(token) for token in row if token != pad] for row in made]
    settings = GenerationOptions(max_new_tokens=12, **options)
    with Decoding(cast(Session, ModuleRun(model)), State((), kept="kept"), batch=3) as decoding:
        got = beam_search(decoding, rows, settings, eos_ids=[pad, *ends], pad_id=pad)
    assert [[token for token in row if token != pad] for row in got] == expected
    assert any(len(row) > 4 for row in got)
    greedy = model.generate(
        input_ids=torch.tensor([rows[0]]), max_new_tokens=12, do_sample=False, pad_token_id=pad
    )
    assert np.array_equal(got[0], greedy[0, len(rows[0]) :]) is False
