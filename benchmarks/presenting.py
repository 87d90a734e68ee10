"""Recorded figures as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from record import RESULTS

__all__ = ["load", "ratio_cell", "table"]


def load(name: str) -> dict[str, Any]:
    """Return the record of a benchmark.

    Args:
        name: Of the file, without ".json".
    """
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return document


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def ratio_cell(ratio: Mapping[str, float]) -> str:
    """Return a ratio with its interval; see interleaved.ratio."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
