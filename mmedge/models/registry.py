"""Registry of model classes by kind of bundle."""

from __future__ import annotations

import importlib
from typing import cast

from mmedge.errors import BundleError
from mmedge.models.base import Model

__all__ = ["MODELS", "model_class"]

# One line per kind.
MODELS: dict[str, str] = {
    "detector": "mmedge.models.detector:Detector",
    "dual_encoder": "mmedge.models.dual_encoder:DualEncoder",
    "encoder": "mmedge.models.encoder:Encoder",
    "fused": "mmedge.models.fused:FusedModel",
    "generator": "mmedge.models.generator:Generator",
    "module": "mmedge.models.module:Module",
}


def model_class(kind: str) -> type[Model]:
    """Return the class of a kind.

    Raises:
        BundleError: If this version has none.
    """
    if kind not in MODELS:
        raise BundleError(
            f"No model class for kind '{kind}', expected one of {sorted(MODELS)}. Update mmedge."
        )
    module, name = MODELS[kind].split(":")
    return cast("type[Model]", getattr(importlib.import_module(module), name))
