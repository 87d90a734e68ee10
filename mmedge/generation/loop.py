"""The loop of a generation: a prefill, then one token of every row per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmedge.errors import InputError
from mmedge.generation.decoding import Decoding, pad_left
from mmedge.generation.lookup import guess
from mmedge.generation.options import GenerationOptions
from mmedge.generation.rows import Row
from mmedge.specs import Float32Array

__all__ = ["check_length", "generate", "prefill"]


def check_length(prompt: int, options: GenerationOptions, largest: int) -> None:
    """Check that a prompt and the new tokens fit, before the first one is computed.

    Raises:
        InputError: If they do not.
    """
    needed = prompt + options.most - 1  # the last token is chosen but not run
    if needed > largest:
        raise InputError(
            f"The prompt of {prompt} tokens and {options.most} new ones need {needed} "
            f"positions, the model has {largest}. Shorten the prompt, or ask for at most "
            f"{max(0, largest + 1 - prompt)} new tokens."
        )


def prefill(decoding: Decoding, prompts: Sequence[Sequence[int]], pad_id: int) -> Float32Array:
    """Run what the state lacks of the prompts and return the last logits (B, V)."""
    ids, mask = pad_left([row[decoding.length :] for row in prompts], pad_id)
    return decoding.step(ids, mask)[:, -1]


def generate(
    decoding: Decoding, rows: Sequence[Row], options: GenerationOptions, *, pad_id: int = 0
) -> Iterator[None]:
    """Continue every row until it ends.

    Args:
        decoding: The batch. What its state holds is the beginning of every prompt.
        rows: With their prompts.
        options: Settings.
        pad_id: Pads prompts, and is fed in the place of rows that have ended.

    Yields:
        After each step: the rows have their new tokens.

    Raises:
        InputError: If the state is full, or lookup is asked for with several rows.
        BackendError: If the session fails.
    """
    if options.lookup and len(rows) > 1:
        raise InputError(f"lookup: got {len(rows)} prompts, expected one. Generate them in turn.")
    logits = prefill(decoding, [row.prompt for row in rows], pad_id)[:, None]
    draft: list[int] = []
    while True:
        if options.cancelled is not None and options.cancelled():
            for row in rows:
                if row.finish is None:
                    row.piece = ""
                    row.end("cancelled")
            yield
            return
        if options.lookup:
            yield from _verified(decoding, rows[0], logits[0], draft)
        else:
            for row, scores in zip(rows, logits[:, -1], strict=True):
                row.piece = ""
                if row.finish is None:
                    row.take(scores)
            yield
        if all(row.finish is not None for row in rows):
            return
        draft = _draft(rows[0], options) if options.lookup else []
        ids = [[pad_id if row.finish else row.made[-1], *draft] for row in rows]
        logits = decoding.step(np.array(ids, np.int64), last=1 + len(draft))


def _draft(row: Row, options: GenerationOptions) -> list[int]:
    left = options.most - len(row.made) - 1
    return guess([*row.prompt, *row.made], min(options.lookup, left)) if left > 0 else []


def _verified(
    decoding: Decoding, row: Row, logits: Float32Array, draft: Sequence[int]
) -> Iterator[None]:
    """Take tokens while they are those of the draft, and one more; drop the rest of the state."""
    held = decoding.length - len(draft)
    for at, one in enumerate(logits):
        token = row.take(np.asarray(one, np.float32))
        last = row.ended or at == len(draft) or token != draft[at]
        if last:  # before the caller can stop: the state then holds the row's tokens alone
            decoding.truncate(held + at)
        yield
        if last:
            return
