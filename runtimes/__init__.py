"""What runs a graph: the Session contract, and one module a backend.

Importing this package loads no engine; a backend's module loads its own when it is asked for.
"""

from mmedge.runtimes.session import (
    BACKENDS,
    Backend,
    Binding,
    EngineOptions,
    Placement,
    Session,
    SessionOptions,
    backend,
    open_session,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Binding",
    "EngineOptions",
    "Placement",
    "Session",
    "SessionOptions",
    "backend",
    "open_session",
]
