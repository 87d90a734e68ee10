"""Progress of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Progress", "ProgressEvent", "ignore_progress"]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Progress event of a conversion.

    Attributes:
        stage: What is being done ("Export image_encoder").
        done: Steps done of this stage.
        total: Steps of this stage, at least 1.
    """

    stage: str
    done: int
    total: int


Progress: TypeAlias = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Ignore an event: the callback of a conversion without progress."""
