"""Telemetry of the libraries in use: off, unless the user's environment enables it."""

from __future__ import annotations

import os

__all__ = ["disable_telemetry"]

_TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime; its own disable call still writes files
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and transformers through it
    "RAY_USAGE_STATS_ENABLED": "0",
}


def disable_telemetry() -> None:
    """Turn telemetry off in this process and its children.

    Each library reads its environment variable when it is imported, so call this before. A
    variable that the user has set is left alone: `ORT_DISABLE_TELEMETRY=0` opts in. OpenVINO has no
    variable; its backend hides the telemetry package from it.
    """
    for name, value in _TELEMETRY_OFF.items():
        if not os.environ.get(name):
            os.environ[name] = value
