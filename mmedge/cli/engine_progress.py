"""Shows on stderr which engine is built, in which phase its build is, and who is waited for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from mmedge.cli.engine_tables import capabilities
from mmedge.cli.output import plain
from mmedge.closing import Closing

if TYPE_CHECKING:
    from typing_extensions import Self

    from mmedge.runtimes.session import BuildProgress
    from mmedge.sessions.preparation import PlannedEngine

__all__ = ["EngineProgress"]


class EngineProgress(Closing):
    """Shows the builds of several engines; use it as a context manager.

    A terminal gets a bar of engines and one of the phase; a log a line an engine, so that minutes
    of silence are no riddle.

    Args:
        engines: How many there will be.
        shown: Whether to show anything.
    """

    def __init__(self, engines: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._console = Console(stderr=True, markup=False, highlight=False, quiet=not shown)
        self._stack = ExitStack()
        self._begun = 0
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._engines = self._bar.add_task("", total=engines)
            self._phase = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._stack.enter_context(self._bar)
        return self

    def close(self) -> None:
        """Give the terminal back."""
        self._stack.close()

    def begin(self, engine: PlannedEngine) -> BuildProgress | None:
        """Show that an engine is built next; return what is told how far it is."""
        doing = f"{plain(engine.label)}, for {capabilities(engine)}"
        if self._bar is None:
            self._console.print(f"{doing} ...", soft_wrap=True)
            return None
        self._bar.update(self._engines, description=doing, completed=self._begun)
        self._begun += 1
        return self._on_progress

    def say(self, message: str) -> None:
        """Show a message, such as whose build is waited for."""
        self._console.print(plain(message), soft_wrap=True)

    def _on_progress(self, phase: str, done: int, steps: int) -> None:
        if self._bar is not None:
            told = f"  {plain(phase)}"
            self._bar.update(
                self._phase, description=told, completed=done, total=steps, visible=True
            )
