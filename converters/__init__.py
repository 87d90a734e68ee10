"""From PyTorch to bundles: what a workstation needs, and a device never imports."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from mmedge.telemetry import disable_telemetry

if TYPE_CHECKING:
    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.fusing import fuse_head
    from mmedge.converters.heads import HeadSpec, SensorInput, TapInput
    from mmedge.converters.modules import convert_module
    from mmedge.converters.progress import Progress, ProgressEvent
    from mmedge.converters.report import ConversionReport
    from mmedge.converters.request import convert

__all__ = [
    "ConversionReport",
    "ConvertConfig",
    "HeadSpec",
    "Progress",
    "ProgressEvent",
    "SensorInput",
    "TapInput",
    "convert",
    "convert_module",
    "fuse_head",
]

_HOMES = {
    "ConversionReport": "report",
    "ConvertConfig": "config",
    "HeadSpec": "heads",
    "Progress": "progress",
    "ProgressEvent": "progress",
    "SensorInput": "heads",
    "TapInput": "heads",
    "convert": "request",
    "convert_module": "modules",
    "fuse_head": "fusing",
}


# Before torch is imported: its idle threads spin otherwise, at three times the CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
disable_telemetry()  # before transformers and huggingface_hub are imported


def __getattr__(name: str) -> object:
    """Import public names lazily: workers that run graphs need no torch."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
