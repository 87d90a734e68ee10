"""Progress of long work on stderr: one line per finished step, a live one for the current.

Import it where work begins: rich comes along.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from mmedge.cli.output import plain

__all__ = ["Steps"]

_WIDE = 110
_DONE, _FAILED = "\N{CHECK MARK}", "\N{BALLOT X}"


class _Counted(MofNCompleteColumn):
    """Column with the count of a step that has parts."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total == 1 else super().render(task)


class Steps(AbstractContextManager["Steps"]):
    """Progress display of steps and their parts, as a context manager.

    A step lasts until the next one and leaves a line with its time. Parts of a step come again and
    again, count while they last, and leave nothing. In a pipe only whole lines are written.

    Args:
        shown: Whether to show anything.
        live: Redraw between calls; not during a benchmark, which that would disturb, and then
            steps leave no line either.
    """

    def __init__(self, *, shown: bool = True, live: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._console.quiet = not shown
        self.animated = self._console.is_terminal and shown
        bar = [BarColumn(bar_width=24)] if self._console.width >= _WIDE else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            *bar,
            _Counted(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            auto_refresh=live,
            disable=not self.animated,
        )
        self._live = live
        self._step = ""
        self._part = ""
        self._started_s = 0.0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Mark how the current step ended, and release the terminal."""
        self._end(_DONE if kind is None else _FAILED)
        self._bar.stop()

    def step(self, name: str, done: int = 0, total: int = 1) -> None:
        """Begin a step with `done` of `total` finished; the same name continues it."""
        if name == self._step:
            return
        self._end(_DONE)
        self._step, self._started_s = name, time.monotonic()
        self._show(name, done, total)

    def part(self, name: str, done: int, total: int) -> None:
        """Show the progress of a part of the current step."""
        if name == self._part:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total)
            return
        self._remove(keep=1 if self._step else 0)
        self._part = name
        self._show(name, done, total)

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(plain(message), markup=False, soft_wrap=True)

    def _show(self, name: str, done: int, total: int) -> None:
        self._bar.add_task(plain(name), completed=done, total=total)
        # Started with the first step: an empty bar leaves a blank line before an error.
        self._bar.start()
        if not self._live:
            self._bar.refresh()

    def _end(self, mark: str) -> None:
        self._remove(keep=0)
        if self._step and self._live:
            self.say(f"{mark} {self._step}  {time.monotonic() - self._started_s:.1f} s")
        self._step = ""

    def _remove(self, keep: int) -> None:
        self._part = ""
        for task in self._bar.task_ids[keep:]:
            self._bar.remove_task(task)
