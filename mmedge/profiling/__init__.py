"""Profiling: latency, throughput, memory, cold start and stages of a bundle on this machine."""

from mmedge.profiling.config import Budget, ProfileConfig
from mmedge.profiling.profiler import Progress, profile
from mmedge.profiling.result import Cell, GateResult, Latency, Profile

__all__ = [
    "Budget",
    "Cell",
    "GateResult",
    "Latency",
    "Profile",
    "ProfileConfig",
    "Progress",
    "profile",
]
