"""From dynamic axes and their bounds to optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmedge.errors import InputError
from mmedge.runtimes.trt.engines import ShapeProfile, ShapeRange
from mmedge.specs import TensorSpec

__all__ = ["shape_profile", "shape_profiles"]

Bounds = tuple[int, int, int]


def shape_profile(inputs: Sequence[TensorSpec], axes: Mapping[str, Bounds]) -> ShapeProfile:
    """Return the profile that takes every input in the bounds of its dynamic axes.

    Args:
        inputs: Of the graph; a str in a shape names a dynamic axis.
        axes: Least, usual and largest size of each dynamic axis, by name. Names that no input has
            are not looked at: one set of bounds serves all graphs of a model.

    Raises:
        InputError: If a dynamic axis has no bounds, or they are not 1 <= least <= usual <= largest.
    """
    unbound = {
        axis: spec.name
        for spec in inputs
        for axis in spec.shape
        if isinstance(axis, str) and axis not in axes
    }
    if unbound:
        told = ", ".join(f"'{axis}' of input '{name}'" for axis, name in unbound.items())
        raise InputError(
            f"An engine is built for ranges of shapes: got no bounds for the axis {told}, only for "
            f"{sorted(axes)}. Give least, usual and largest size, such as axes={{'batch': (1, 1, "
            "8)}}."
        )
    for name, (least, usual, most) in axes.items():
        if not 1 <= least <= usual <= most:
            raise InputError(
                f"Axis '{name}': got the bounds {(least, usual, most)}, expected 1 <= least <= "
                "usual <= largest."
            )
    return ShapeProfile({spec.name: _range(spec, axes) for spec in inputs})


def shape_profiles(
    inputs: Sequence[TensorSpec], ranges: Sequence[Mapping[str, Bounds]]
) -> tuple[ShapeProfile, ...]:
    """Return a profile for each set of bounds, in their order; equal ones once.

    Args:
        inputs: Of the graph.
        ranges: Bounds by axis, see shape_profile. An engine tries its profiles in this order, so
            the narrow ones, whose kernels are chosen for few shapes, come first.

    Raises:
        InputError: If there are none, or as shape_profile.
    """
    if not ranges:
        raise InputError("An engine needs at least one set of bounds: got none.")
    made: list[ShapeProfile] = []
    for axes in ranges:
        profile = shape_profile(inputs, axes)
        if profile not in made:
            made.append(profile)
    return tuple(made)


def _range(spec: TensorSpec, axes: Mapping[str, Bounds]) -> ShapeRange:
    least, usual, most = (
        tuple(axes[axis][bound] if isinstance(axis, str) else axis for axis in spec.shape)
        for bound in range(3)
    )
    return ShapeRange(least, usual, most)
