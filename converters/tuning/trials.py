"""Finished candidates of a search on disk, to resume a killed search.

The folder is beside the bundle and is removed after a successful search. A candidate's JSON is
written after its files and holds their hashes: changed files are built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.bundle.manifest import Layout
from mmedge.bundle.quality import Figure, Parity, Quality
from mmedge.bundle.tuning import Speed
from mmedge.converters.methods.configs import QuantizationConfig, WeightOnly
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.tuning.pareto import Trial
from mmedge.converters.variants.builder import BuiltVariant, keeping
from mmedge.converters.variants.describe import files_of
from mmedge.errors import ConversionError
from mmedge.files import sha256_file, storage_errors, write_atomic
from mmedge.files.json_file import read_json
from mmedge.specs import Array

__all__ = ["TrialStore"]

_KEY = "key.json"
_SUFFIX = ".trial.json"
_MAX_TRIAL_BYTES = 64 << 20
_ARRAYS = ".trial.npz"
# Fields of methods that name layers, and which layers has been measured.
_CHOSEN = ("keep", "lowered")


class TrialStore(AbstractContextManager["TrialStore"]):
    """Finished candidates of a search, by role and recipe."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open or create the folder of a search.

        Args:
            folder: Made if it is not there; emptied if it belongs to another search.
            key: JSON of everything that the candidates depend on.

        Raises:
            ConversionError: If another process is searching there.
            StorageError: If the disk is full or the place cannot be written.
        """
        self.folder = folder
        self._whole: set[Path] = set()
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._take_lock()
            with storage_errors(folder):
                self._begin(json.dumps(key, sort_keys=True).encode())
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"{self.folder}: another process is searching for the same bundle. Wait for it, or "
                "write to another place with -o."
            ) from error
        except OSError:
            return  # a file system without locks

    def _begin(self, key: bytes) -> None:
        """Empty the folder unless it belongs to this search."""
        known = self.folder / _KEY
        if known.is_file() and known.read_bytes() == key:
            return
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        write_atomic(known, key)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove everything after a successful search, and release the lock."""
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def role_folder(self, role: str) -> Path:
        """Return the folder of a role's graphs."""
        path = self.folder / role
        with storage_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def save(self, role: str, trial: Trial) -> None:
        """Store a finished candidate."""
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
            named: dict[str, Any] = {f"golden/{name}": a for name, a in built.golden.items()}
            named |= {f"collected/{name}": a for name, a in built.collected.items()}
            named |= {f"steps/{name}": a for name, a in built.steps.items()}
            np.savez(buffer, **named)
            arrays = folder / f"{trial.name}{_ARRAYS}"
            write_atomic(arrays, buffer.getvalue())
            files = {arrays, *files_of(built)} | ({built.nodes} if built.nodes else set())
            document["files"] = {path.name: sha256_file(path) for path in sorted(files)}
            document["built"] = {
                "models": {layout: model.name for layout, model in built.models.items()},
                "nodes": None if built.nodes is None else built.nodes.name,
                "opset": built.opset,
                "parity": built.parity.model_dump(mode="json"),
                "duration_s": built.duration_s,
                "chosen": {
                    layout: {name: list(getattr(method, name, ())) for name in _CHOSEN}
                    for layout, method in built.recipe.methods.items()
                },
            }
        signed = {"trial": document, "sha256": _sha256(document)}
        write_atomic(folder / f"{trial.name}{_SUFFIX}", json.dumps(signed).encode())

    def load(
        self, role: str, recipe: Recipe, drop: Callable[[Quality | None], Figure]
    ) -> Trial | None:
        """Return a finished candidate, None if it is missing or a file of it has changed.

        Args:
            role: Its role.
            recipe: How it is made.
            drop: Returns what a quality loses of the metric.
        """
        folder = self.folder / role
        place = folder / f"{recipe.variant}{_SUFFIX}"
        document = _read(place)
        if document is None:
            return None
        # Hashed once: the lock excludes other writers.
        if place not in self._whole and not _as_written(folder, document.get("files", {})):
            return None
        self._whole.add(place)
        known = document.get("built")
        built = None if known is None else _built(folder, recipe, known)
        quality = document["quality"]
        speed = document["speed"]
        measured = None if quality is None else Quality.model_validate(quality)
        return Trial(
            recipe=recipe if built is None else built.recipe,
            built=built,
            quality=measured,
            drop=None if built is None else drop(measured),
            size_bytes=document["size_bytes"],
            speed=None if speed is None else Speed.model_validate(speed),
            failure=document["failure"],
            duration_s=document["duration_s"],
        )


def _sha256(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """Return a candidate's document, None if it is missing or has changed."""
    try:
        signed = read_json(path, max_bytes=_MAX_TRIAL_BYTES, error=ConversionError)
    except ConversionError:
        return None
    if not isinstance(signed, dict):
        return None
    document = signed.get("trial")
    if not isinstance(document, dict) or signed.get("sha256") != _sha256(document):
        return None
    return document


def _as_written(folder: Path, files: Mapping[str, str]) -> bool:
    """Return whether every file of a candidate has its recorded hash."""
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == sha256
        for name, sha256 in files.items()
    )


def _with_layers(
    method: QuantizationConfig, layers: Mapping[str, Sequence[str]]
) -> QuantizationConfig:
    """Return a method with its chosen layers."""
    if layers["keep"]:
        method = keeping(method, tuple(layers["keep"]))
    if isinstance(method, WeightOnly):
        method = replace(method, lowered=tuple(layers["lowered"]))
    return method


def _built(folder: Path, recipe: Recipe, document: Mapping[str, Any]) -> BuiltVariant:
    methods = {
        layout: _with_layers(method, document["chosen"][layout])
        for layout, method in recipe.methods.items()
    }
    models: dict[Layout, Path] = {
        layout: folder / name for layout, name in document["models"].items()
    }
    with np.load(folder / f"{recipe.variant}{_ARRAYS}", allow_pickle=False) as arrays:
        kept: dict[str, dict[str, Array]] = {"golden": {}, "collected": {}, "steps": {}}
        for key in arrays.files:
            group, _, name = key.partition("/")
            kept[group][name] = arrays[key]
    return BuiltVariant(
        recipe=replace(recipe, methods=methods),
        models=models,
        nodes=None if document["nodes"] is None else folder / document["nodes"],
        opset=document["opset"],
        parity=Parity.model_validate(document["parity"]),
        golden=kept["golden"],
        collected=kept["collected"],
        duration_s=document["duration_s"],
        steps=kept["steps"],
    )
