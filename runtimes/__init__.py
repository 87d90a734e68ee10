"""Runtimes: the Session and Backend contracts, and one package per backend.

Importing this package loads no engine; a backend loads its own when it is first used.
"""

from mmedge.runtimes.backends import BACKENDS, DEFAULT_BACKEND, Backend, backend, open_session
from mmedge.runtimes.session import (
    Binding,
    BuildProgress,
    EngineOptions,
    Placement,
    Session,
    SessionOptions,
    StatefulRun,
)

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "Backend",
    "Binding",
    "BuildProgress",
    "EngineOptions",
    "Placement",
    "Session",
    "SessionOptions",
    "StatefulRun",
    "backend",
    "open_session",
]
