"""The calls of one batch on a decoder with state: mask, positions and inputs kept in step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.runtimes.session import Session
from mmedge.specs import Array, Float32Array, State

__all__ = ["IDS", "LOGITS", "MASK", "DecoderInputs", "Decoding", "TokenInputs", "pad_left"]

IDS, MASK, LOGITS, POSITIONS = "input_ids", "attention_mask", "logits", "logit_positions"


class DecoderInputs(Protocol):
    """Makes the inputs of a decoder's call, beside its mask and state, from token ids.

    A decoder of texts takes the ids. One that takes embeddings looks them up and puts those of
    images in the place of their tokens; one with cross-attention or positions of its own adds them.
    """

    def inputs(self, ids: Array, mask: Array) -> Mapping[str, Array]:
        """Return the inputs of the next call.

        Args:
            ids: (B, T) int64, the new tokens; the first call's are the prompts.
            mask: (B, P + T) int64, 0 where a position is padding; P positions are in the state.
        """
        ...

    def reorder(self, rows: Array) -> None:
        """Follow a change of rows: row i continues what was row `rows[i]`."""
        ...


class TokenInputs(DecoderInputs):
    """Token ids, and nothing else."""

    def inputs(self, ids: Array, mask: Array) -> Mapping[str, Array]:  # noqa: ARG002
        """Return the ids."""
        return {IDS: ids}

    def reorder(self, rows: Array) -> None:
        """Do nothing: ids come with each call."""


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


class Decoding(Closing):
    """One batch of sequences in a decoder's state.

    Args:
        session: Input `attention_mask`, output `logits` (B, K, V), and the state; where this keeps
            some positions alone, input `logit_positions` (B, K).
        state: Of the session's graph.
        inputs: Makes the other inputs.
        batch: Number of sequences.
        held: Positions that `given` holds, all of them tokens.
        given: First values of the state, for each row or for one that all rows continue.

    Raises:
        InputError, BackendError: See Session.start.
    """

    def __init__(
        self,
        session: Session,
        state: State,
        inputs: DecoderInputs | None = None,
        *,
        batch: int = 1,
        held: int = 0,
        given: Mapping[str, Array] | None = None,
    ) -> None:
        self._inputs = TokenInputs() if inputs is None else inputs
        self._run = session.start(state, batch=1 if held else batch, given=given)
        if held and batch > 1:
            self._run.reorder(np.zeros(batch, np.int64))
        self._mask = np.ones((batch, held), np.int64)
        self._keeps = state.kept is not None

    @property
    def length(self) -> int:
        """Number of positions in the state."""
        return self._run.length

    def step(self, ids: Array, mask: Array | None = None, *, last: int = 1) -> Float32Array:
        """Run the decoder on new tokens.

        Args:
            ids: (B, T) int64.
            mask: (B, T) int64, 0 where a token is padding; None for none.
            last: Number of tokens, from the last, whose logits are needed.

        Returns:
            Logits (B, last, V).

        Raises:
            InputError: If they do not fit, or the state is full.
            BackendError: If the session fails.
        """
        new = np.ones_like(ids) if mask is None else mask
        whole = np.concatenate([self._mask[:, : self.length], new], axis=1)
        feed = {MASK: whole, **self._inputs.inputs(ids, whole)}
        if self._keeps:
            feed[POSITIONS] = np.tile(np.arange(last, dtype=np.int64)[::-1], (len(ids), 1))
        logits = self._run.step(feed)[LOGITS]
        self._mask = whole
        return np.asarray(logits[:, -last:], np.float32)

    def reorder(self, rows: Array) -> None:
        """Let row i continue what was row `rows[i]`."""
        self._run.reorder(rows)
        self._mask = self._mask[rows]
        self._inputs.reorder(rows)

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self._run.truncate(length)
        self._mask = self._mask[:, :length]

    def save(self) -> dict[str, Array]:
        """Return a copy of the state by input name."""
        return self._run.save()

    def close(self) -> None:
        """Free the state. Closing twice is allowed."""
        self._run.close()
