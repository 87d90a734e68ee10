"""mmedge: multimodal models from PyTorch to edge devices.

Importing this package loads no engine and nothing heavy: its names are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmedge.bundle import Bundle, open_bundle
    from mmedge.errors import MmedgeError
    from mmedge.models import (
        Classification,
        Detections,
        Detector,
        DualEncoder,
        EncodedFiles,
        Encoder,
        verify_bundle,
    )
    from mmedge.models.banks import PrototypeBank
    from mmedge.models.features import Features
    from mmedge.models.fused import load_head
    from mmedge.models.heads import HeadOutput, Stamped
    from mmedge.models.load import load
    from mmedge.retrieval.index import Index
    from mmedge.retrieval.items import Match
    from mmedge.runtimes.session import SessionOptions

    __version__: str

__all__ = [
    "Bundle",
    "Classification",
    "Detections",
    "Detector",
    "DualEncoder",
    "EncodedFiles",
    "Encoder",
    "Features",
    "HeadOutput",
    "Index",
    "Match",
    "MmedgeError",
    "PrototypeBank",
    "SessionOptions",
    "Stamped",
    "__version__",
    "load",
    "load_head",
    "open_bundle",
    "verify_bundle",
]

# Where each name lives; the same list as under TYPE_CHECKING, which a test compares.
_HOMES = {
    "Bundle": "mmedge.bundle",
    "Classification": "mmedge.models",
    "Detections": "mmedge.models",
    "Detector": "mmedge.models",
    "DualEncoder": "mmedge.models",
    "EncodedFiles": "mmedge.models",
    "Encoder": "mmedge.models",
    "Features": "mmedge.models.features",
    "HeadOutput": "mmedge.models.heads",
    "Index": "mmedge.retrieval.index",
    "Match": "mmedge.retrieval.items",
    "MmedgeError": "mmedge.errors",
    "PrototypeBank": "mmedge.models.banks",
    "SessionOptions": "mmedge.runtimes.session",
    "Stamped": "mmedge.models.heads",
    "load": "mmedge.models.load",
    "load_head": "mmedge.models.fused",
    "open_bundle": "mmedge.bundle",
    "verify_bundle": "mmedge.models",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("mmedge")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'mmedge' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
