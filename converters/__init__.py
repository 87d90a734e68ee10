"""From PyTorch to bundles: what a workstation needs, and a device never imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmedge.converters.config import ConversionReport, ConvertConfig, Progress, ProgressEvent
    from mmedge.converters.pipeline import convert

__all__ = ["ConversionReport", "ConvertConfig", "Progress", "ProgressEvent", "convert"]


def __getattr__(name: str) -> object:
    """Import public names when they are asked for: workers that run graphs need no torch."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module = "pipeline" if name == "convert" else "config"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
