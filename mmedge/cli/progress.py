"""Progress of long work on stderr: a line for each stage that is done, a moving one for the rest.

Import it where work begins: rich comes along.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Protocol

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

__all__ = ["Stages"]

_WIDE = 110
_DONE, _FAILED = "\N{CHECK MARK}", "\N{BALLOT X}"


class _Event(Protocol):
    """Where the work stands: converters.config.ProgressEvent, which a device has not."""

    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class _Counted(MofNCompleteColumn):
    """Steps, where there is more than one."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total == 1 else super().render(task)


class Stages(AbstractContextManager["Stages"]):
    """Shows stages as they are told; use it as a context manager.

    A stage of one step ("Make image_encoder int8-static") lasts until the next of its kind and
    leaves a line with its time. Stages of more steps ("Calibrate image_encoder") are parts of it:
    they come again and again, count while they last, and leave nothing. In a pipe only the lines
    that are left are written.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        bar = [BarColumn(bar_width=24)] if self._console.width >= _WIDE else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            *bar,
            _Counted(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._stage = ""
        self._part = ""
        self._started_s = 0.0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell how the running stage ended, and give the terminal back."""
        self._end(_DONE if kind is None else _FAILED)
        self._bar.stop()

    def __call__(self, event: _Event) -> None:
        """Show where the work stands."""
        if event.total > 1:
            if event.stage != self._part:
                self._remove(keep=1 if self._stage else 0)
                self._part = event.stage
                self._bar.add_task(plain(event.stage), total=event.total)
            self._bar.update(self._bar.task_ids[-1], completed=event.done)
        elif event.stage != self._stage:
            self._end(_DONE)
            self._stage, self._started_s = event.stage, time.monotonic()
            self._bar.add_task(plain(event.stage), total=1)
        else:
            return
        # Started with the first stage: a bar of none leaves an empty line before an error.
        self._bar.start()

    def _end(self, mark: str) -> None:
        self._remove(keep=0)
        if self._stage:
            seconds = time.monotonic() - self._started_s
            text = f"{mark} {plain(self._stage)}  {seconds:.1f} s"
            self._console.print(text, markup=False, soft_wrap=True)
        self._stage = ""

    def _remove(self, keep: int) -> None:
        self._part = ""
        for task in self._bar.task_ids[keep:]:
            self._bar.remove_task(task)
