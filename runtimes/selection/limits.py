"""What graphs may cost when they are run for the first time here."""

from __future__ import annotations

import math
import os

from mmedge.errors import InputError, TimeLimitError

__all__ = ["TIME_LIMIT_S", "may_measure", "time_limit", "time_limit_error"]

TIME_LIMIT_S = 300.0
"""Seconds in which a graph must open and process its golden inputs, unless another limit is set."""

_VARIABLE = "MMEDGE_TIME_LIMIT_S"
_MEASURE = "MMEDGE_MEASURE"


def time_limit(wanted_s: float | None = None) -> float | None:
    """Return the time limit of a graph in seconds, None for no limit.

    Args:
        wanted_s: None takes MMEDGE_TIME_LIMIT_S of the environment, else TIME_LIMIT_S. 0 is no
            limit; graphs then run in this process.

    Raises:
        InputError: If it is negative or no number.
    """
    stated: object = wanted_s if wanted_s is not None else os.environ.get(_VARIABLE, TIME_LIMIT_S)
    try:
        limit_s = float(str(stated))
    except ValueError:
        limit_s = math.nan
    if not (math.isfinite(limit_s) and limit_s >= 0):
        raise InputError(
            f"Time limit: got {stated!r}, expected seconds, or 0 for no limit "
            f"(the argument, or {_VARIABLE})."
        )
    return limit_s or None


def may_measure(wanted: bool | None = None) -> bool:
    """Return whether a load may measure which backend is the fastest.

    Args:
        wanted: None takes MMEDGE_MEASURE of the environment ("0" forbids it), else True.

    Raises:
        InputError: If the variable is neither "0" nor "1".
    """
    if wanted is not None:
        return wanted
    stated = os.environ.get(_MEASURE, "1")
    if stated not in {"0", "1"}:
        raise InputError(f"{_MEASURE}: got {stated!r}, expected 0 (never measure) or 1.")
    return stated == "1"


def time_limit_error(what: str, limit_s: float | None) -> TimeLimitError:
    """Return the error for exceeding the time limit."""
    return TimeLimitError(
        f"{what} did not end within {limit_s:g} s. A graph that never ends is a fault or an "
        f"attack; where this machine is only slow, set {_VARIABLE} to more seconds, or to 0 for "
        "no limit."
    )
