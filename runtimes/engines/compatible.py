"""Compatible cached engines, e.g. built for a larger batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmedge.runtimes.engines.spec import BuildSettings, EngineKey, ShapeProfile
from mmedge.runtimes.engines.store import CachedEngine, EngineCache

__all__ = ["compatible_key"]


def compatible_key(cache: EngineCache, wanted: EngineKey) -> EngineKey:
    """Return the key of a compatible cached engine, else the wanted key.

    So what `mmedge build` made for larger batches, or stripped, is found by whoever asks for the
    usual engine. Of several the one used last is taken, one that holds its weights before one that
    is stripped. One that is refittable serves only who asks for that: TensorRT 11.3 may drop a bias
    there (its release notes, known issues).

    Args:
        cache: Where to look.
        wanted: What is needed.

    Raises:
        StorageError: If others may write the cache's folder, or it cannot be read.
    """
    found = cache.find(wanted)
    if isinstance(found, CachedEngine) or found.kind == "damaged":
        return wanted
    requests = [
        entry.record.key.request
        for entry in cache.entries()
        if entry.record is not None and entry.record.key.model_sha256 == wanted.model_sha256
    ]
    for request in sorted(requests, key=lambda request: request.settings.stripped):
        if not _alike(request.settings, wanted.request.settings):
            continue
        if not _take(request.profiles, wanted.request.profiles):
            continue
        changed = replace(wanted.request, profiles=request.profiles, settings=request.settings)
        other = replace(wanted, request=changed)
        if isinstance(cache.find(other), CachedEngine):  # of this version, for this GPU
            return other
    return wanted


def _alike(held: BuildSettings, wanted: BuildSettings) -> bool:
    """Return whether an engine runs the same, apart from build time and location."""
    return held == replace(wanted, workspace_bytes=held.workspace_bytes, stripped=held.stripped)


def _take(held: Sequence[ShapeProfile], wanted: Sequence[ShapeProfile]) -> bool:
    """Return whether every wanted profile lies within an existing one."""
    return all(any(_within(inner, outer) for outer in held) for inner in wanted)


def _within(inner: ShapeProfile, outer: ShapeProfile) -> bool:
    return inner.ranges.keys() == outer.ranges.keys() and all(
        len(small.min) == len(large.min)
        and all(a >= b for a, b in zip(small.min, large.min, strict=True))
        and all(a <= b for a, b in zip(small.max, large.max, strict=True))
        for small, large in ((inner.ranges[name], outer.ranges[name]) for name in inner.ranges)
    )
