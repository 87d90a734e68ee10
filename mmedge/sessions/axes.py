"""Bounds of a role's dynamic axes, for engine profiles."""

from __future__ import annotations

from mmedge.bundle.manifest import Manifest, Variant
from mmedge.specs import Axis

__all__ = ["dynamic_axes", "role_of"]


def dynamic_axes(manifest: Manifest, role: str, *, batch: int = 1) -> dict[str, Axis]:
    """Return the bounds of the dynamic axes of a role's inputs, by name.

    Args:
        manifest: Of the bundle.
        role: Name of a role that it holds.
        batch: Largest batch, where it is above the manifest's.
    """
    axes = {name: entry.axis() for name, entry in manifest.roles[role].axes.items()}
    if "batch" in axes and batch > axes["batch"].max:
        axes["batch"] = Axis(axes["batch"].min, axes["batch"].opt, batch)
    return axes


def role_of(manifest: Manifest, variant: Variant) -> str | None:
    """Return the name of a variant's role; None if it belongs to another bundle."""
    return next((name for name, role in manifest.roles.items() if variant in role.variants), None)
