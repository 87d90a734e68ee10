"""Greedy generation: a prefill, then one token of every row per step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import numpy as np

from mmedge.errors import InputError, ShapeError
from mmedge.runtimes.session import Session
from mmedge.specs import Array, Float32Array, State

__all__ = ["LogitsHook", "generate", "pad_left"]

LogitsHook: TypeAlias = Callable[[Array, Float32Array], Float32Array]
"""Takes the tokens of each row so far (B, N) int64, prompt included, and the logits of the next one
(B, V) float32; returns the logits to choose from."""

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Return token ids (B, T) int64, padded on the left, and the attention mask (B, T) int64.

    Raises:
        InputError: If there are no rows, or one is empty.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("Prompts: got an empty one or none at all, expected a token in each.")
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for at, row in enumerate(rows):
        ids[at, longest - len(row) :] = row
        mask[at, longest - len(row) :] = 1
    return ids, mask


def generate(
    session: Session,
    state: State,
    ids: Array,
    mask: Array,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    pad_id: int = 0,
    hook: LogitsHook | None = None,
) -> Array:
    """Continue every row greedily until its end token.

    Args:
        session: Inputs `input_ids` and `attention_mask`, output `logits` (B, T, V), and the state.
        state: Of the session's graph.
        ids: (B, T) int64, the prompts, padded on the left.
        mask: (B, T) int64, 0 where a row is padded.
        max_new_tokens: Largest number of tokens to add.
        eos_ids: Tokens that end a row.
        pad_id: Stands behind the end of a row.
        hook: Changes the logits before the choice.

    Returns:
        The new tokens (B, N) int64, N up to `max_new_tokens`: each row up to and with the token
        that ends it, then `pad_id`.

    Raises:
        InputError: If shapes do not fit, a row is empty, or prompt and new tokens exceed the
            state's capacity.
        BackendError: If the session fails.
    """
    _check_prompt(ids, mask, max_new_tokens, state.capacity)
    batch = len(ids)
    tokens, running = ids, np.ones(batch, bool)
    ends = np.fromiter(eos_ids, np.int64)
    feed = {IDS: ids, MASK: mask}
    with session.start(state, batch=batch) as run:
        for _ in range(max_new_tokens):
            logits = np.asarray(run.step(feed)[LOGITS][:, -1], np.float32)
            if hook is not None:
                logits = hook(tokens, logits)
            chosen = np.where(running, logits.argmax(axis=-1), pad_id)[:, None]
            tokens = np.concatenate([tokens, chosen], axis=1)
            running &= ~np.isin(chosen[:, 0], ends)
            if not running.any():
                break
            feed = {IDS: chosen, MASK: np.pad(feed[MASK], ((0, 0), (0, 1)), constant_values=1)}
    return tokens[:, ids.shape[1] :]


def _check_prompt(ids: Array, mask: Array, max_new_tokens: int, capacity: int | None) -> None:
    if ids.ndim != 2 or not ids.size or ids.shape != mask.shape:
        raise ShapeError(
            f"Prompts: got ids {ids.shape} and mask {mask.shape}, expected (rows, tokens) for both."
        )
    if not mask[:, -1].all():
        raise InputError("Prompts: a row ends in padding. Pad on the left, as pad_left does.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: got {max_new_tokens}, expected at least 1.")
    # The last token is chosen but not run.
    needed = ids.shape[1] + max_new_tokens - 1
    if capacity is not None and needed > capacity:
        raise InputError(
            f"The prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones need {needed} "
            f"positions, the model has {capacity}. Shorten the prompt, or ask for at most "
            f"{max(0, capacity + 1 - ids.shape[1])} new tokens."
        )
