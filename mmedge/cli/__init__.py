"""The `mmedge` command: one file per command, heavy imports deferred until it runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from mmedge.errors import MmedgeError
from mmedge.telemetry import disable_telemetry

__all__ = ["main"]

_FAILED = 1
_SIGNALLED = 128  # plus the signal's number, as in shells
_SIGNALS = ("SIGTERM", "SIGHUP")  # absent on Windows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 128 + N ended by signal N.

    SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is removed.

    An MmedgeError becomes its message on stderr, and so does a RuntimeWarning;
    MMEDGE_TRACEBACK=1 shows where an error came from.
    Anything else that escapes a command is a bug and keeps its traceback.

    Args:
        arguments: What follows the program's name; None takes them from the process.
    """
    _leave_current_folder_out()
    _accept_any_text()
    disable_telemetry()
    received: list[int] = []
    try:
        from mmedge.cli.app import run

        with _signals_as_interrupts(received), _warnings_as_messages():
            code = run(arguments)
        sys.stdout.flush()
    except MmedgeError as error:
        if os.environ.get("MMEDGE_TRACEBACK", "0") not in ("", "0"):
            raise
        from mmedge.cli.output import print_error

        print_error(str(error))
        code = _FAILED
    except KeyboardInterrupt as error:
        from mmedge.cli.output import print_error

        print_error(
            " ".join(["Interrupted. No partial output is left behind.", *map(str, error.args)])
        )
        code = _SIGNALLED + (received or [signal.SIGINT])[0]
    except BrokenPipeError:
        # The reader has seen enough (`mmedge inspect ... | head`). What is still buffered goes
        # nowhere, or the interpreter would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _FAILED
    sys.exit(code)


def _leave_current_folder_out() -> None:
    """Remove what an empty entry of PYTHONPATH adds to `sys.path`: the current folder."""
    entries = (os.environ.get("PYTHONPATH") or os.sep).split(os.pathsep)
    if "" in entries and (here := os.getcwd()) not in entries:  # noqa: PTH109, pathlib may be there
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


@contextmanager
def _signals_as_interrupts(received: list[int]) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into a KeyboardInterrupt; an ignored one (nohup) stays ignored.

    Args:
        received: Gets the number of the signal.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not disturb the cleanup
        received.append(number)
        raise KeyboardInterrupt

    known = [signal.Signals[name] for name in _SIGNALS if hasattr(signal, name)]
    here = threading.current_thread() is threading.main_thread()  # required for a handler
    taken = [each for each in known if here and signal.getsignal(each) is signal.SIG_DFL]
    for each in taken:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def _warnings_as_messages() -> Iterator[None]:
    """Print a RuntimeWarning as a message, without its source line."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if file is not None or not issubclass(category, RuntimeWarning):
                show(message, category, filename, lineno, file, line)
                return
            from mmedge.cli.output import print_warning

            print_warning(str(message))

        warnings.showwarning = shown
        yield


def _accept_any_text() -> None:
    """Escape characters that the terminal cannot encode, and undecodable file names."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
