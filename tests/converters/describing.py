"""A source described and frozen, as a conversion does before it exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.converters.families import family_of
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.fingerprint import computing_config, tensors_sha256
from mmedge.converters.sources.frozen import embedding_space, freeze
from mmedge.converters.sources.source import Source, open_source
from mmedge.preprocess.registry import Processor

__all__ = ["Described", "changed_config", "describe", "describe_frozen"]


@dataclass(frozen=True)
class Described:
    """What is known of a source before its roles are exported; `model` is transformers'."""

    source: Source
    family: str
    model: Any
    spec: ModelSpec

    def freeze(self, out: Path) -> dict[str, Processor]:
        """Write the processors' files into a new folder and check them."""
        out.mkdir(exist_ok=True)
        source = self.source if self.spec.reference_processors else None
        with quiet_libraries():
            return freeze(source, self.spec.processors, self.spec.files, out)

    @property
    def space(self) -> str:
        """The embedding-space fingerprint."""
        computed = computing_config(self.model.config)
        weights = tensors_sha256(self.model)
        return embedding_space(
            self.family, weights, computed, self.spec.processors, self.spec.files
        )


def describe(folder: Path) -> Described:
    """Open, load and describe a source."""
    with quiet_libraries():
        source = open_source(str(folder))
        family = family_of(source)
        model = family.load(source)
        return Described(source, family.name, model, family.describe(source, model))


def describe_frozen(folder: Path, out: Path) -> Described:
    """Describe a source and check its processors."""
    described = describe(folder)
    described.freeze(out)
    return described


def changed_config(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """Copy a source and set keys of its config; those of a section one by one."""
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (out / "config.json").write_text(json.dumps(config))
    return out
