"""From PyTorch to bundles: what a workstation needs, and a device never imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmedge.telemetry import disable_telemetry

if TYPE_CHECKING:
    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.modules import convert_head, convert_module
    from mmedge.converters.progress import Progress, ProgressEvent
    from mmedge.converters.report import ConversionReport
    from mmedge.converters.request import convert

__all__ = [
    "ConversionReport",
    "ConvertConfig",
    "Progress",
    "ProgressEvent",
    "convert",
    "convert_head",
    "convert_module",
]

_HOMES = {
    "ConversionReport": "report",
    "ConvertConfig": "config",
    "Progress": "progress",
    "ProgressEvent": "progress",
    "convert": "request",
    "convert_head": "modules",
    "convert_module": "modules",
}


disable_telemetry()  # before transformers and huggingface_hub are imported


def __getattr__(name: str) -> object:
    """Import public names lazily: workers that run graphs need no torch."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
