"""Profiling: latency, throughput, memory, cold start and stages of a bundle on this machine."""

from mmedge.profiling.config import QUICK, Budget, ProfileConfig
from mmedge.profiling.profiler import Plan, Progress, profile
from mmedge.profiling.result import Cell, GateResult, Latency, Profile

__all__ = [
    "QUICK",
    "Budget",
    "Cell",
    "GateResult",
    "Latency",
    "Plan",
    "Profile",
    "ProfileConfig",
    "Progress",
    "profile",
]
