"""Cache-miss explanations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from mmedge.runtimes.engines.record import EngineRecord
from mmedge.runtimes.engines.spec import EngineKey, ShapeProfile

__all__ = ["Miss", "differences", "explain"]


@dataclass(frozen=True, slots=True)
class Miss:
    """A cache miss.

    Attributes:
        kind: "absent" if none of this key was found, "damaged" if one was and is not to be loaded.
        reason: Why, in words, such as "built for TensorRT 10.3, this is 10.7".
        nearest: The engine of the same model that differs least, None if there is none.
    """

    kind: Literal["absent", "damaged"]
    reason: str
    nearest: EngineRecord | None = None


def explain(key: EngineKey, records: Iterable[EngineRecord]) -> Miss:
    """Return the miss of a key, explained by the nearest engine of the same model.

    Args:
        key: What was looked for and not found.
        records: Of every engine in the cache.
    """
    of_model = [record for record in records if record.key.model_sha256 == key.model_sha256]
    if not of_model:
        return Miss("absent", "no engine of this model has been built yet")
    nearest = min(
        of_model,
        key=lambda record: (
            record.key.request.backend != key.request.backend,
            len(differences(record.key, key)),
            -record.built_unix_s,
        ),
    )
    return Miss("absent", "; ".join(differences(nearest.key, key)), nearest)


def differences(built: EngineKey, wanted: EngineKey) -> list[str]:
    """Return the differences between an engine and the wanted one as text; empty if none."""
    differences = []
    had, now = built.request, wanted.request
    if built.model_sha256 != wanted.model_sha256:
        differences.append("built from another model")
    if had.backend != now.backend:
        differences.append(
            f"built for {had.backend} {built.version}, this is {now.backend} {wanted.version}"
        )
    elif built.version != wanted.version:
        differences.append(f"built for {had.backend} {built.version}, this is {wanted.version}")
    for name, before, after in (
        ("CUDA", built.cuda, wanted.cuda),
        ("driver", built.driver, wanted.driver),
    ):
        if before != after:
            differences.append(
                f"built for {name} {before or 'of any version'}, this is {after or 'none'}"
            )
    if built.compute_capability != wanted.compute_capability:
        differences.append(
            f"built for compute capability {built.compute_capability}, expected "
            f"{wanted.compute_capability}"
        )
    elif had.compute_capabilities != now.compute_capabilities:
        differences.append(
            f"built for {_targets(had.compute_capabilities)}, requested "
            f"{_targets(now.compute_capabilities)}"
        )
    differences += _profile_differences(had.profiles, now.profiles)
    before_settings, after_settings = asdict(had.settings), asdict(now.settings)
    differences += [
        f"built with {name} {before_settings[name]}, requested {after_settings[name]}"
        for name in before_settings
        if before_settings[name] != after_settings[name]
    ]
    return differences


def _targets(capabilities: tuple[str, ...]) -> str:
    return " and ".join(capabilities) or "the GPU of the machine"


def _profile_differences(
    built: tuple[ShapeProfile, ...], wanted: tuple[ShapeProfile, ...]
) -> list[str]:
    if len(built) != len(wanted):
        return [f"built with {len(built)} shape profiles, requested {len(wanted)}"]
    differences = []
    for number, (before, after) in enumerate(zip(built, wanted, strict=True)):
        where = f" (profile {number})" if len(built) > 1 else ""
        for name in sorted(before.ranges.keys() | after.ranges.keys()):
            had, now = before.ranges.get(name), after.ranges.get(name)
            if had == now:
                continue
            if had is None or now is None:
                differences.append(
                    f"built {'without' if had is None else 'with'} input '{name}'{where}"
                )
            else:
                differences.append(
                    f"built for '{name}' from {had.min} over {had.opt} to {had.max}, "
                    f"requested {now.min} over {now.opt} to {now.max}{where}"
                )
    return differences
