"""Finished candidates of a search on disk, so that a killed search goes on where it was.

The folder lies beside the bundle and is removed with a search that ends well. A candidate's JSON is
written after its files: what has one is complete.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Layout, Parity, Quality
from mmedge.bundle.search import Speed
from mmedge.converters.quality import drop
from mmedge.converters.recipes import Recipe
from mmedge.converters.variants import BuiltVariant, keeping
from mmedge.converters.verdicts import Trial
from mmedge.errors import ConversionError
from mmedge.files import storage_errors, write_atomic

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TrialStore", "drop_of"]

_KEY = "key.json"
_SUFFIX = ".trial.json"


class TrialStore:
    """The candidates that a search has finished, by role and recipe."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open the folder of a search, or begin one.

        Args:
            folder: Made if it is not there; emptied if it belongs to another search.
            key: JSON of everything that the candidates depend on.

        Raises:
            ConversionError: If another process is searching there.
            StorageError: If the disk is full or the place cannot be written.
        """
        self.folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConversionError(
                f"{folder}: another process is searching for the same bundle. Wait for it, or "
                "write to another place."
            ) from error
        wanted = json.dumps(key, sort_keys=True)
        known = folder / _KEY
        with storage_errors(folder):
            if not known.is_file() or known.read_text("utf-8") != wanted:
                for path in folder.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                write_atomic(known, wanted.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """Remove everything: the search has ended well."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def role_folder(self, role: str) -> Path:
        """Return where a role's graphs go."""
        path = self.folder / role
        with storage_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def save(self, role: str, trial: Trial) -> None:
        """Keep a finished candidate."""
        folder = self.role_folder(role)
        document: dict[str, Any] = {
            "failure": trial.failure,
            "duration_s": trial.duration_s,
            "size_bytes": trial.size_bytes,
            "quality": None if trial.quality is None else trial.quality.model_dump(mode="json"),
            "speed": None if trial.speed is None else trial.speed.model_dump(mode="json"),
        }
        built = trial.built
        if built is not None:
            buffer = io.BytesIO()
            np.savez(buffer, golden=built.golden, embeddings=built.embeddings)
            write_atomic(folder / f"{trial.name}.trial.npz", buffer.getvalue())
            document["built"] = {
                "models": {layout: model.name for layout, model in built.models.items()},
                "nodes": None if built.nodes is None else built.nodes.name,
                "opset": built.opset,
                "parity": built.parity.model_dump(mode="json"),
                "duration_s": built.duration_s,
                "keep": {
                    layout: list(getattr(method, "keep", ()))
                    for layout, method in built.recipe.methods.items()
                },
            }
        write_atomic(folder / f"{trial.name}{_SUFFIX}", json.dumps(document).encode())

    def load(self, role: str, recipe: Recipe, metric: str) -> Trial | None:
        """Return a finished candidate, None if there is none.

        Args:
            role: Its role.
            recipe: How it is made.
            metric: What its drop is of.
        """
        folder = self.folder / role
        path = folder / f"{recipe.variant}{_SUFFIX}"
        if not path.is_file():
            return None
        document = json.loads(path.read_text("utf-8"))
        built = None
        if document.get("built") is not None:
            built = _built(folder, recipe, document["built"])
            if not all(model.is_file() for model in built.models.values()):
                return None
        quality = document["quality"]
        speed = document["speed"]
        known = None if quality is None else Quality.model_validate(quality)
        return Trial(
            recipe=recipe if built is None else built.recipe,
            built=built,
            quality=known,
            drop=None if built is None else drop_of(metric, known),
            size_bytes=document["size_bytes"],
            speed=None if speed is None else Speed.model_validate(speed),
            failure=document["failure"],
            duration_s=document["duration_s"],
        )


def drop_of(metric: str, quality: Quality | None) -> Figure:
    """Return what is lost of a metric: nothing of fp32, which has no quality without a task."""
    if quality is None:
        return Figure(value=0.0, low=0.0, high=0.0)
    return drop(metric, quality)


def _built(folder: Path, recipe: Recipe, document: Mapping[str, Any]) -> BuiltVariant:
    methods = {
        layout: keeping(method, tuple(document["keep"][layout]))
        if document["keep"].get(layout)
        else method
        for layout, method in recipe.methods.items()
    }
    models: dict[Layout, Path] = {
        layout: folder / name for layout, name in document["models"].items()
    }
    with np.load(folder / f"{recipe.variant}.trial.npz", allow_pickle=False) as arrays:
        golden, embeddings = arrays["golden"], arrays["embeddings"]
    return BuiltVariant(
        recipe=replace(recipe, methods=methods),
        models=models,
        nodes=None if document["nodes"] is None else folder / document["nodes"],
        opset=document["opset"],
        parity=Parity.model_validate(document["parity"]),
        golden=golden,
        embeddings=embeddings,
        duration_s=document["duration_s"],
    )
