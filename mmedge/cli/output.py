"""Output of commands: consoles, messages and JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "human_bytes",
    "plain",
    "print_error",
    "print_json",
    "print_pieces",
    "print_warning",
    "stdout_console",
]

_PIPE_WIDTH = 10_000


def stdout_console() -> Console:
    """Return a console for results on stdout.

    It takes no markup, since what it prints comes from files. In a terminal it keeps to the width;
    in a pipe nothing is folded or coloured, so that a line stays a line for grep.
    """
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(markup=False, emoji=False, highlight=False, width=_PIPE_WIDTH if piped else None)


def print_error(message: str) -> None:
    """Print an error message to stderr, in red on a terminal."""
    _print_message("Error: ", message, "red")


def print_warning(message: str) -> None:
    """Print a warning message to stderr, in yellow on a terminal."""
    _print_message("Warning: ", message, "yellow")


def _print_message(what: str, message: str, colour: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble((what, f"bold {colour}"), (plain(message), colour)))


def print_json(document: object) -> None:
    """Print a document to stdout as JSON only; non-finite numbers become null."""
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")


def print_pieces(pieces: Iterable[str]) -> None:
    """Print pieces of a text to stdout as they come, control characters escaped but for tabs."""
    for piece in pieces:
        sys.stdout.write("\t".join(map(plain, piece.split("\t"))))
        sys.stdout.flush()


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def plain(text: str) -> str:
    """Return `text` with control characters escaped: file contents must not steer a terminal."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def human_bytes(size_bytes: int) -> str:
    """Return a readable size: "512 B", "1.5 kB", "350 MB" (powers of 1000)."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size, unit = size_bytes / 1000, "kB"
    for larger in ("MB", "GB"):
        if size >= 999.5:
            size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
