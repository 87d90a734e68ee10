"""The greedy loop over a model that counts: what it feeds, and when it stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.generation import generate, pad_left
from mmedge.runtimes.session import Session
from mmedge.specs import Array, State

WORDS, END, PAD = 10, 7, 9
STATE = State(tensors=(), length="past", capacity=12)


class Counting(Closing):
    """A session and its run: after n comes n + 1; rows and positions are checked."""

    def __init__(self) -> None:
        self.feeds: list[Mapping[str, Array]] = []
        self.closed = False
        self.length = 0

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
        logits = np.zeros((*ids.shape, WORDS), np.float32)
        np.put_along_axis(logits, (ids[..., None] + 1) % WORDS, 1.0, axis=-1)
        return {"logits": logits}

    def close(self) -> None:
        self.closed = True


def run(rows: list[list[int]], **options: Any) -> tuple[Array, Counting]:
    model = Counting()
    ids, mask = pad_left(rows, PAD)
    defaults: dict[str, Any] = {"max_new_tokens": 4, "eos_ids": [END], "pad_id": PAD}
    made = generate(cast(Session, model), STATE, ids, mask, **(defaults | options))
    assert model.closed
    return made, model


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_an_empty_prompt_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(InputError, match="empty"):
        pad_left(rows, PAD)


def test_the_prompt_is_run_once_and_then_each_token() -> None:
    made, model = run([[1, 2], [3]])
    assert made.tolist() == [[3, 4, 5, 6], [4, 5, 6, END]]
    assert [feed["input_ids"].shape for feed in model.feeds] == [(2, 2), (2, 1), (2, 1), (2, 1)]
    assert model.feeds[-1]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_a_row_that_has_ended_is_padded_until_the_last_one_ends() -> None:
    made, model = run([[5], [3]], max_new_tokens=8)
    assert made.tolist() == [[6, END, PAD, PAD], [4, 5, 6, END]]
    assert len(model.feeds) == 4  # not a step more


def test_without_an_end_it_stops_at_the_number_of_tokens() -> None:
    made, _model = run([[6]], eos_ids=(), max_new_tokens=3)
    assert made.tolist() == [[7, 8, 9]]


def test_a_hook_sees_the_tokens_and_changes_the_choice() -> None:
    seen = []

    def never_four(tokens: Array, logits: Array) -> Array:
        seen.append(tokens.tolist())
        logits[:, 4] = -np.inf
        return logits

    made, _model = run([[2]], hook=never_four, max_new_tokens=3)
    assert made.tolist() == [[3, 0, 1]]
    assert seen == [[[2]], [[2, 3]], [[2, 3, 0]]]


def test_a_mismatch_is_refused_before_a_step() -> None:
    made, _model = run([[1] * 12], max_new_tokens=1)
    assert made.shape == (1, 1)
    with pytest.raises(InputError, match="at most 1 new tokens"):
        run([[1] * 12], max_new_tokens=2)
    with pytest.raises(InputError, match="at least 1"):
        run([[1]], max_new_tokens=0)
    with pytest.raises(InputError, match="Pad on the left"):
        generate(
            cast(Session, Counting()), STATE, np.ones((1, 2), np.int64),
            np.array([[1, 0]]), max_new_tokens=1,
        )  # fmt: skip
