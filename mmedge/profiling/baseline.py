"""Baselines: another bundle, a variant of the same one, or an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import ProfileError
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.opening import open_variant

__all__ = ["Baselines", "Opponent", "resolve_baseline"]


@dataclass(frozen=True, slots=True)
class Opponent:
    """The baseline model of one variant.

    Attributes:
        name: To print.
        model: An ONNX file, or a bundle and a variant of it.
    """

    name: str
    model: Path | tuple[Bundle, Variant]

    def open(self, backend_name: str, options: SessionOptions) -> Session:
        """Open it with the settings of the profiled variant.

        Raises:
            BackendUnavailableError, PlacementError, BackendError: See Backend.open_session.
        """
        if isinstance(self.model, Path):
            return open_session(self.model, backend_name=backend_name, options=options)
        bundle, variant = self.model
        return open_variant(bundle, variant, backend_name=backend_name, options=options)


Baselines: TypeAlias = Mapping[tuple[str, str], Opponent]
"""By role and variant of the profiled bundle; those without an opponent are not in it."""


def resolve_baseline(
    spec: str, bundle: Bundle, chosen: Mapping[str, Sequence[Variant]], backend_name: str
) -> Baselines:
    """Find the baseline of every variant.

    Args:
        spec: `:VARIANT` is a variant or precision of the same bundle, which the other variants are
            compared with; `BUNDLE` another bundle, where the variant of the same name stands
            against ours, else the first of the same precision, else the first; `BUNDLE:VARIANT`
            that variant of it; `FILE.onnx` a graph that takes a role's inputs.
        bundle: The bundle that is profiled.
        chosen: Its variants that are profiled, by role.
        backend_name: Reads what an ONNX file takes.

    Raises:
        ProfileError: If there is nothing at the path, or nothing that fits a role.
        BundleError: If the other bundle cannot be opened.
        InputError: If the bundle has no such variant.
        BackendError: If the ONNX file cannot be opened.
    """
    if spec.startswith(":"):
        return _same_bundle(spec[1:], bundle, chosen)
    path, variant = Path(spec), None
    if not path.exists() and ":" in spec:
        before, _, variant = spec.rpartition(":")
        path = Path(before)
    if path.is_file():
        return _onnx_file(path, bundle, chosen, backend_name)
    if not path.exists():
        raise ProfileError(
            f"Baseline '{spec}': {path} does not exist. Expected a bundle, BUNDLE:VARIANT, "
            ":VARIANT of the same bundle, or an ONNX file."
        )
    return _other_bundle(open_bundle(path), variant, chosen)


def _same_bundle(wanted: str, bundle: Bundle, chosen: Mapping[str, Sequence[Variant]]) -> Baselines:
    found: dict[tuple[str, str], Opponent] = {}
    for role, variants in chosen.items():
        other = bundle.variant(role, wanted)
        for variant in variants:
            if variant.name != other.name:
                found[role, variant.name] = Opponent(other.name, (bundle, other))
    if not found:
        raise ProfileError(
            f"Baseline ':{wanted}' is the only profiled variant. Profile another one with it, "
            "or name another bundle."
        )
    return found


def _other_bundle(
    other: Bundle, wanted: str | None, chosen: Mapping[str, Sequence[Variant]]
) -> Baselines:
    found: dict[tuple[str, str], Opponent] = {}
    for role, variants in chosen.items():
        if role not in other.manifest.roles:
            continue
        for variant in variants:
            theirs = _counterpart(other, role, variant, wanted)
            found[role, variant.name] = Opponent(
                f"{other.path.name}:{theirs.name}", (other, theirs)
            )
    if not found:
        raise ProfileError(
            f"Baseline {other.path}: got roles {list(other.manifest.roles)}, expected at least one "
            f"of {list(chosen)}."
        )
    return found


def _counterpart(other: Bundle, role: str, variant: Variant, wanted: str | None) -> Variant:
    if wanted is not None:
        return other.variant(role, wanted)
    ladder = other.role(role).variants
    same_name = [v for v in ladder if v.name == variant.name]
    same_precision = [v for v in ladder if v.precision is variant.precision]
    return (*same_name, *same_precision, *ladder)[0]


def _onnx_file(
    path: Path, bundle: Bundle, chosen: Mapping[str, Sequence[Variant]], backend_name: str
) -> Baselines:
    options = SessionOptions(threads=1)
    with open_session(path, backend_name=backend_name, options=options) as session:
        takes = {(spec.name, spec.dtype.name, len(spec.shape)) for spec in session.inputs}
    found = {
        (role, variant.name): Opponent(path.name, path)
        for role, variants in chosen.items()
        for variant in variants
        if {(e.name, e.dtype, len(e.shape)) for e in bundle.role(role).inputs} == takes
    }
    if not found:
        got = sorted(f"{name} {dtype}" for name, dtype, _ in takes)
        expected = {
            role: sorted(f"{entry.name} {entry.dtype}" for entry in bundle.role(role).inputs)
            for role in chosen
        }
        raise ProfileError(
            f"Baseline {path}: its inputs are {got}, expected those of a role: {expected}. "
            "Export it with the same inputs."
        )
    return found
