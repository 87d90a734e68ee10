"""Command and environment of the Python processes that mmedge starts.

`python -m` and `python -c` put the current folder first on `sys.path`, so that a `numpy.py` in a
downloaded folder would run. `-P` keeps it out from Python 3.11 on only, and `-I` would also hide
packages of the user's site folder and of PYTHONPATH, which installations rely on. So a child
removes the current folder itself, before it imports anything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmedge.telemetry import disable_telemetry

__all__ = ["absolute_entries", "child_command", "child_environment"]

# `sys` is built in, and `open` needs only modules that Python loads at start.
_GUARD = """\
import sys
del sys.argv[0]
sys.path[:] = [entry for entry in sys.path if entry]
__file__ = sys.argv[0]
with open(__file__, encoding="utf-8") as script:
    exec(compile(script.read(), __file__, "exec"))
"""


def child_command(script: Path, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a file as `__main__` in a new process of this Python.

    Start it with child_environment.

    Args:
        script: A module of mmedge; its package's `__init__` is not imported.
        arguments: The script's `sys.argv[1:]`.
    """
    return (sys.executable, "-c", _GUARD, str(script), *arguments)


def child_environment() -> dict[str, str]:
    """Return this process's environment without entries that import code from the current folder.

    An absolute path in PYTHONPATH is kept, the current folder's too: the user has named it.
    """
    disable_telemetry()
    environment = dict(os.environ)
    for name in ("PYTHONINSPECT", "PYTHONSTARTUP"):
        environment.pop(name, None)
    environment["PYTHONSAFEPATH"] = "1"  # Python 3.11: for the child's own children
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] = absolute_entries(environment["PYTHONPATH"])
        if not environment["PYTHONPATH"]:
            del environment["PYTHONPATH"]
    return environment


def absolute_entries(paths: str) -> str:
    """Return a search path such as PATH without empty and relative entries.

    Those stand for the current folder or one below it.
    """
    return os.pathsep.join(entry for entry in paths.split(os.pathsep) if Path(entry).is_absolute())
