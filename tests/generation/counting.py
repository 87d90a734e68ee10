"""A decoder that counts: after token n comes n + 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from mmedge.closing import Closing
from mmedge.generation.decoding import Decoding
from mmedge.generation.loop import check_length, generate
from mmedge.generation.options import GenerationOptions
from mmedge.generation.rows import Row
from mmedge.runtimes.session import Session
from mmedge.specs import Array, State

__all__ = ["END", "PAD", "STATE", "WORDS", "Counting", "run"]

WORDS, END, PAD = 10, 7, 9
STATE = State(tensors=(), length="past", capacity=12)


class Counting(Closing):
    """A session and its run. Rows and positions are checked."""

    def __init__(self) -> None:
        self.feeds: list[Mapping[str, Array]] = []
        self.closed = False
        self.length = 0
        self.held: list[int] = []  # tokens of the first row

    def start(self, state: State, *, batch: int = 1, **_other: Any) -> Counting:
        assert state is STATE
        self.batch = batch
        return self

    def step(self, feed: Mapping[str, Array]) -> Mapping[str, Array]:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        assert mask.shape == (self.batch, self.length + ids.shape[1])
        self.feeds.append(feed)
        self.length += ids.shape[1]
        self.held += ids[0].tolist()
        logits = np.zeros((*ids.shape, WORDS), np.float32)
        np.put_along_axis(logits, (ids[..., None] + 1) % WORDS, 1.0, axis=-1)
        return {"logits": logits}

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length
        del self.held[length:]

    def close(self) -> None:
        self.closed = True


def run(
    prompts: Sequence[Sequence[int]], *, eos_ids: Sequence[int] = (END,), **options: Any
) -> tuple[list[Row], Counting]:
    """Generate with a counting model."""
    settings = GenerationOptions(**({"max_new_tokens": 4} | options))
    model = Counting()
    assert STATE.capacity is not None
    check_length(max(map(len, prompts)), settings, STATE.capacity)
    rows = [Row(prompt, settings, eos_ids, position=at) for at, prompt in enumerate(prompts)]
    with Decoding(cast(Session, model), STATE, batch=len(rows)) as decoding:
        for _ in generate(decoding, rows, settings, pad_id=PAD):
            pass
    assert model.closed
    return rows, model
