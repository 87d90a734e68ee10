"""Optimization profiles from bounds of dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmedge.errors import InputError
from mmedge.runtimes.engines.spec import ShapeProfile, ShapeRange
from mmedge.specs import Axis, TensorSpec, shape_of

__all__ = ["shape_profile", "shape_profiles"]


def shape_profile(inputs: Sequence[TensorSpec], axes: Mapping[str, Axis]) -> ShapeProfile:
    """Return the profile that covers every input within the bounds of its dynamic axes.

    Args:
        inputs: Inputs of the graph.
        axes: Bounds of each dynamic axis, by name. Names that no input has are ignored, so that
            one set of bounds serves all graphs of a model; a sum of names needs none of its own.

    Raises:
        InputError: If a dynamic axis has no bounds.
    """
    made: dict[str, ShapeRange] = {}
    for spec in inputs:
        shapes = [
            shape_of(spec, {name: getattr(axis, bound) for name, axis in axes.items()})
            for bound in ("min", "opt", "max")
        ]
        sizes = [shape for shape in shapes if shape is not None]
        if len(sizes) < len(shapes):
            raise InputError(
                f"Input {spec}: an engine is built for ranges of shapes, got bounds only for "
                f"{sorted(axes)}. Give min, opt and max of each dynamic axis, such as "
                "axes={'batch': Axis(1, 1, 8)}."
            )
        made[spec.name] = ShapeRange(*sizes)
    return ShapeProfile(made)


def shape_profiles(
    inputs: Sequence[TensorSpec], ranges: Sequence[Mapping[str, Axis]]
) -> tuple[ShapeProfile, ...]:
    """Return one profile per set of bounds, in order, without duplicates.

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
