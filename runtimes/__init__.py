"""What runs a graph: the Session contract, and one module a backend.

Importing this package loads no engine; a backend's module loads its own when it is asked for.
"""

from mmedge.runtimes.session import (
    BACKENDS,
    Backend,
    Binding,
    BuildProgress,
    EngineOptions,
    Placement,
    Session,
    SessionOptions,
    always_prepared,
    backend,
    nothing_to_prepare,
    open_session,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Binding",
    "BuildProgress",
    "EngineOptions",
    "Placement",
    "Session",
    "SessionOptions",
    "always_prepared",
    "backend",
    "nothing_to_prepare",
    "open_session",
]
