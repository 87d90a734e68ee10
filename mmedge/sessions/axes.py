"""How large the dynamic axes of a role get, for engines that are built for ranges of shapes."""

from __future__ import annotations

from mmedge.bundle.manifest import Manifest, Role, Variant
from mmedge.specs import Axis, Modality

__all__ = ["IMAGE_BATCH", "TEXT_BATCH", "dynamic_axes", "role_of"]

# What DualEncoder runs at once unless it is told otherwise: past these sizes a batch gains next to
# nothing on a CPU, and memory grows with it.
IMAGE_BATCH = 8
TEXT_BATCH = 32

_USUAL_TOKENS = 16  # of a caption or a label


def dynamic_axes(manifest: Manifest, role: str, *, batch: int = 1) -> dict[str, Axis]:
    """Return the bounds of the dynamic axes of a role's inputs, by name.

    The first axis of an input is its batch: opt is one, max what DualEncoder runs at once. Any
    other axis of a text goes up to the tokenizer's length. What nothing in the manifest bounds is
    left out.

    Args:
        manifest: Of the bundle.
        role: Name of a role that it holds.
        batch: Samples that will be run at once, where they are more than DualEncoder's.
    """
    entry = manifest.roles[role]
    text = manifest.preprocessing.text
    axes: dict[str, Axis] = {}
    for shape in (each.shape for each in entry.inputs):
        for position, axis in enumerate(shape):
            if not isinstance(axis, str):
                continue
            if position == 0:
                axes[axis] = Axis(1, 1, max(_batch(entry), batch))
            elif entry.modality is Modality.TEXT and text is not None and axis not in axes:
                length = text.max_length
                always = text.padding == "max_length"
                axes[axis] = Axis(1, length if always else min(_USUAL_TOKENS, length), length)
    return axes


def role_of(manifest: Manifest, variant: Variant) -> str | None:
    """Return the name of the role that holds a variant; None if it is of another bundle."""
    return next((name for name, role in manifest.roles.items() if variant in role.variants), None)


def _batch(role: Role) -> int:
    return TEXT_BATCH if role.modality is Modality.TEXT else IMAGE_BATCH
