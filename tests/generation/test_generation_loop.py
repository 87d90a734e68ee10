"""The loop over a model that counts: what it feeds, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from generation.counting import END, PAD, STATE, Counting, run

from mmedge.errors import InputError
from mmedge.generation.decoding import Decoding, pad_left
from mmedge.generation.lookup import guess
from mmedge.generation.loop import generate
from mmedge.generation.options import GenerationOptions
from mmedge.generation.rows import Row
from mmedge.runtimes.session import Session
from mmedge.specs import Float32Array


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_an_empty_prompt_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(InputError, match="empty"):
        pad_left(rows, PAD)


def test_the_prompt_is_run_once_and_then_each_token() -> None:
    rows, model = run([[1, 2], [3]])
    assert [row.made for row in rows] == [[3, 4, 5, 6], [4, 5, 6, END]]
    assert [row.finish for row in rows] == ["length", "end"]
    assert [feed["input_ids"].shape for feed in model.feeds] == [(2, 2), (2, 1), (2, 1), (2, 1)]
    assert model.feeds[-1]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_a_row_that_has_ended_is_padded_until_the_last_one_ends() -> None:
    rows, model = run([[5], [3]], max_new_tokens=8)
    assert [row.made for row in rows] == [[6, END], [4, 5, 6, END]]
    assert len(model.feeds) == 4  # not a step more
    assert model.feeds[-1]["input_ids"].tolist() == [[PAD], [6]]


def test_without_an_end_it_stops_at_the_number_of_tokens() -> None:
    (row,), _model = run([[6]], eos_ids=(), max_new_tokens=3)
    assert (row.made, row.finish) == ([7, 8, 9], "length")


def test_an_id_that_stops() -> None:
    (row,), _model = run([[2]], stop_ids=(4,))
    assert (row.made, row.finish) == ([3, 4], "stop")


def test_a_processor_sees_the_tokens_and_changes_the_choice() -> None:
    seen = []

    def never_four(prompt: Sequence[int], made: Sequence[int], logits: Float32Array) -> Any:
        seen.append((list(prompt), list(made)))
        logits = logits.copy()
        logits[4] = -np.inf
        return logits

    (row,), _model = run([[2]], processors=(never_four,), max_new_tokens=3)
    assert row.made == [3, 0, 1]
    assert seen == [([2], []), ([2], [3]), ([2], [3, 0])]


def test_it_is_cancelled_before_the_next_token() -> None:
    answers = iter([False, False, True])
    (row,), model = run([[1]], cancelled=lambda: next(answers))
    assert (row.made, row.finish) == ([2, 3], "cancelled")
    assert len(model.feeds) == 3


def test_what_does_not_fit_is_refused_before_a_step() -> None:
    (row,), _model = run([[1] * 12], max_new_tokens=1)
    assert len(row.made) == 1
    with pytest.raises(InputError, match="at most 1 new tokens"):
        run([[1] * 12], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": True}, "max_new_tokens: got True"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": 1e-40}, "temperature: got 1e-40, expected 0, or 1e-06"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: got nan"),
        ({"stop": "a"}, "stop: got 'a'"),
        ({"stop": ("",)}, "none empty"),
        ({"stop": (5,)}, "stop: got"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"seed": "1"}, "seed: got '1'"),
        ({"top_k": 1.5}, "top_k: got 1.5, expected a whole number"),
        ({"beams": 2.0}, "beams: got 2.0"),
        ({"lookup": 2.5}, "lookup: got 2.5"),
        ({"beams": 2, "temperature": 1.0}, "beams: got 2 with temperature"),
        ({"beams": 2, "lookup": 4}, "beams: got 2 with lookup"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationOptions(**options)


@pytest.mark.parametrize("lookup", [1, 3, 8])
@pytest.mark.parametrize("prompt", [[1, 2, 3, 4, 1, 2], [5, 5, 5, 0, 0], [3]])
def test_lookup_takes_what_plain_decoding_takes(prompt: list[int], lookup: int) -> None:
    (plain,), slow = run([prompt], max_new_tokens=6)
    (row,), fast = run([prompt], max_new_tokens=6, lookup=lookup)
    assert (row.made, row.finish) == (plain.made, plain.finish)
    assert len(fast.feeds) <= len(slow.feeds)
    if prompt[0] == 1 and lookup == 3:
        assert len(fast.feeds) < len(slow.feeds)


@pytest.mark.parametrize("prompt", [[1, 2, 3, 9, 1, 2], [1, 2, 5, 1, 2], [3]])
def test_where_the_caller_stops_the_state_holds_the_tokens_of_the_row(prompt: list[int]) -> None:
    settings, model = GenerationOptions(max_new_tokens=6, lookup=3), Counting()
    row = Row(prompt, settings, (END,))
    with Decoding(cast(Session, model), STATE) as decoding:
        for _ in generate(decoding, [row], settings, pad_id=PAD):
            tokens = [*prompt, *row.made]
            assert model.held[: len(tokens)] == tokens[: decoding.length]


def test_lookup_takes_one_prompt() -> None:
    with pytest.raises(InputError, match="got 2 prompts"):
        run([[1], [2]], lookup=2)


def test_guesses_are_what_followed_the_latest_place() -> None:
    assert guess([1, 2, 8, 9, 1, 2, 5, 6, 1, 2], 2) == [5, 6]
    assert guess([1, 2, 3, 1, 2], 9) == [3, 1, 2]
    assert guess([1, 2, 3], 4) == []
    assert guess([], 4) == []


def test_draws_are_repeated_with_their_seed_alone() -> None:
    def draws(seed: int | None) -> list[list[int]]:
        rows, _model = run([[1], [1]], eos_ids=(), temperature=5.0, max_new_tokens=12, seed=seed)
        return [row.made for row in rows]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1)[0] != draws(1)[1]
    assert draws(None) != draws(None)
    assert [row.made for row in run(
        [[1]], eos_ids=(), temperature=5.0, max_new_tokens=12, seed=1
    )[0]] == draws(1)[:1]  # fmt: skip
