"""Freezing of a source's preprocessing into the bundle, compared with the original."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from mmedge.converters.sources.source import Source
from mmedge.files import storage_errors
from mmedge.preprocess.config import ProcessorConfig
from mmedge.preprocess.registry import Processor, open_processor

__all__ = ["CHECKS", "embedding_space", "freeze"]

_HERE = "mmedge.converters.sources.reference_processors"
CHECKS: dict[str, str] = {
    "image": f"{_HERE}:check_image_preprocessing",
    "text": f"{_HERE}:check_text_preprocessing",
    "video": f"{_HERE}:check_video_preprocessing",
    "audio": "mmedge.converters.sources.reference_audio:check_audio_preprocessing",
}
"""Function by the `type` of a processor that compares it with the source's own; a type without one
has no reference to be compared with."""


def freeze(
    source: Source | None,
    processors: Mapping[str, ProcessorConfig],
    files: Mapping[str, bytes],
    folder: Path,
) -> dict[str, Processor]:
    """Write the processors' files into `folder`, open them, and compare them with the source's.

    Args:
        source: The source; None where there are no reference processors.
        processors: Configurations by name.
        files: Content by path in the bundle.
        folder: The bundle.

    Raises:
        ExportError: If a sample comes out otherwise than with the reference.
        BundleError: If a processor cannot be opened.
        StorageError: If the disk is full.
    """
    for name, content in files.items():
        path = folder / name
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    opened = {name: open_processor(config, folder) for name, config in processors.items()}
    for config in processors.values():
        if source is not None and (place := CHECKS.get(config.type)) is not None:
            module, function = place.split(":")
            check = getattr(importlib.import_module(module), function)
            cast("Callable[[Source, Any, Path], None]", check)(source, config, folder)
    return opened


def embedding_space(
    family: str,
    weights_sha256: str,
    config: Mapping[str, object],
    processors: Mapping[str, ProcessorConfig],
    files: Mapping[str, bytes],
) -> str:
    """Return the embedding-space fingerprint of a model in fp32.

    Args:
        family: The family's name.
        weights_sha256: Hash of the tensors.
        config: What of the configuration changes the outputs.
        processors: The model's processors.
        files: What they read.
    """
    known = [
        weights_sha256,
        config,
        {name: _settings(one) for name, one in processors.items()},
        {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    ]
    content = json.dumps(known, sort_keys=True, default=str)
    return f"{family}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _settings(config: ProcessorConfig) -> dict[str, object]:
    """Return what a configuration sets: a new field with a default changes no fingerprint."""
    found = config.model_dump(mode="json", exclude_defaults=True) | {"type": config.type}
    if steps := getattr(config, "steps", ()):
        set_by = (step.model_dump(mode="json", exclude_defaults=True) for step in steps)
        found["steps"] = [{**one, "op": step.op} for step, one in zip(steps, set_by, strict=True)]
    return found
