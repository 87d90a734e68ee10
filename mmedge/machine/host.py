"""Access to the machine's files, commands and Python packages (mockable).

All that `mmedge doctor` learns goes through a Host, so that a test can describe any machine by a
folder and a few outputs. Nothing here raises: what cannot be read or run is as if it were not
there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmedge.children import absolute_entries, child_command, child_environment
from mmedge.runtimes.backends import BACKENDS, backend
from mmedge.runtimes.processor import allowed_processors

__all__ = ["Host", "PythonFacts"]

_COMMAND_S = 15
_PROBE_S = 90  # first import of an engine from a slow SD card


def _run(command: Sequence[str]) -> str | None:
    """Return the output of a command; None if it is missing, fails or takes too long."""
    paths = absolute_entries(os.environ.get("PATH", os.defpath))
    program = shutil.which(command[0], path=paths)
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603, commands of this module's callers
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _probe(name: str) -> Mapping[str, object]:
    """Probe an engine in a separate process, where a crash is a result."""
    try:
        done = subprocess.run(  # noqa: S603, this very package
            child_command(Path(__file__).with_name("probes.py"), name),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        return {"fault": f"it did not finish within {_PROBE_S} s"}
    except OSError as error:
        return {"fault": f"no process could be started: {error}"}
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        return {"fault": said[-1] if said else f"it ended with exit code {done.returncode}"}
    return answer if isinstance(answer, dict) else {"fault": "its output is not JSON"}


def _engine_version(name: str) -> str | None:
    return backend(name).engine_version() if name in BACKENDS else None


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free_bytes(path: Path) -> int | None:
    """Return the free space at a folder that may not exist yet."""
    try:
        there = next((place for place in (path, *path.parents) if place.exists()), None)
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """The Python that runs mmedge.

    Attributes:
        version: Such as "3.10.12".
        executable: Its path.
        virtual: Whether it is a virtual environment's.
        sees_system: Whether it also sees the packages of the system.
    """

    version: str
    executable: str
    virtual: bool
    sees_system: bool

    @classmethod
    def of_this_process(cls) -> PythonFacts:
        """Return the facts of this process's Python."""
        virtual = sys.prefix != sys.base_prefix
        try:
            config = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8").lower()
        except OSError:
            config = ""
        sees = not virtual or "include-system-site-packages = true" in config
        return cls(platform.python_version(), sys.executable, virtual, sees)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine.

    Attributes:
        root: Where its file system begins.
        run: Returns a command's output, None if it fails.
        probe: Returns what an engine, by the name of its backend, or "cuda" says of itself, or a
            document with a `fault`.
        engine_version: Returns the installed version behind a backend's name, None if none is.
        package: Returns the version of an installed distribution, None if it is not there.
        free_bytes: Returns the free space where a folder is or would be made.
        architecture: As reported by `uname -m`.
        processors: Those that this process may use.
        environment: Environment variables.
        python: The Python that runs mmedge.
    """

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = _run
    probe: Callable[[str], Mapping[str, object]] = _probe
    engine_version: Callable[[str], str | None] = _engine_version
    package: Callable[[str], str | None] = _package
    free_bytes: Callable[[Path], int | None] = _free_bytes
    architecture: str = field(default_factory=platform.machine)
    processors: tuple[int, ...] = field(default_factory=allowed_processors)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: PythonFacts = field(default_factory=PythonFacts.of_this_process)

    def text(self, path: str) -> str:
        """Return a file's text without the NUL bytes of a device tree, "" if it is missing.

        Args:
            path: From the root, without a leading slash.
        """
        try:
            data = (self.root / path).read_bytes()
        except OSError:
            return ""
        return data.decode("utf-8", "replace").replace("\0", "\n").strip()

    def has(self, path: str) -> bool:
        """Return whether a file exists.

        Args:
            path: From the root, without a leading slash.
        """
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def matching(self, pattern: str) -> tuple[Path, ...]:
        """Return the sorted paths that match a pattern from the root."""
        try:
            return tuple(sorted(self.root.glob(pattern)))
        except OSError:
            return ()
