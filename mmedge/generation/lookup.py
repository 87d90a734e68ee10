"""Prompt-lookup decoding: what followed the same tokens before is a guess at what follows now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["guess"]

_LONGEST, _SHORTEST = 4, 2


def guess(tokens: Sequence[int], most: int) -> list[int]:
    """Return up to `most` tokens that followed the latest earlier place of the last few tokens.

    Args:
        tokens: Of the row so far, prompt included.
        most: Largest number of tokens.
    """
    whole = np.asarray(tokens, np.int64)
    for size in range(min(_LONGEST, len(whole) - 1), _SHORTEST - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(whole[:-1], size)
        (places,) = np.nonzero((windows == whole[-size:]).all(axis=1))
        if len(places):
            start = int(places[-1]) + size
            return [int(token) for token in whole[start : start + most]]
    return []
