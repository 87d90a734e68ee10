"""Which graphs of a bundle are exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmedge.bundle.manifest import Layout, Role, Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import InputError

__all__ = ["Selection", "select"]


@dataclass(frozen=True, slots=True)
class Selection:
    """One graph to export.

    Attributes:
        role: Its role.
        variant: Its variant.
        layout: The layout that is taken.
        note: What a user should know of the choice, "" for nothing.
    """

    role: str
    variant: Variant
    layout: Layout
    note: str = ""


def select(
    bundle: Bundle,
    *,
    roles: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    layouts: Sequence[Layout] = ("portable",),
) -> tuple[Selection, ...]:
    """Choose what is exported.

    Args:
        bundle: An opened bundle.
        roles: Role names; None takes all.
        precisions: For each role every one of these that it has: exact names of variants, or
            precisions, for the variant of highest fidelity that can be exported. None takes the
            role's default, or the one of highest fidelity if the default cannot be exported, and
            says so in `note`.
        layouts: Layouts that can be exported, the preferred one first.

    Returns:
        In the order of the manifest, no graph twice.

    Raises:
        InputError: If there is no such role, if no role has a precision that is asked for, or if
            a role has no variant that can be exported.
    """
    wanted = tuple(dict.fromkeys(roles)) if roles is not None else tuple(bundle.manifest.roles)
    for name in wanted:
        bundle.role(name)  # a wrong name is an error that lists the right ones
    chosen: list[Selection] = []
    for name in bundle.manifest.roles:
        if name in wanted:
            chosen += _of_role(bundle, name, precisions, layouts)
    for precision in precisions or ():
        if not any(_answers(selection.variant, precision) for selection in chosen):
            raise InputError(_nowhere(bundle, wanted, precision, layouts))
    missing = [name for name in wanted if name not in {each.role for each in chosen}]
    if missing:
        raise InputError(
            f"{bundle.path}: role '{missing[0]}' has none of {list(precisions or ())} that can be "
            f"exported, only {_exportable(bundle.role(missing[0]), layouts)}. Name one of those as "
            "well, or leave the role out with --role."
        )
    return tuple(chosen)


def _of_role(
    bundle: Bundle, name: str, precisions: Sequence[str] | None, layouts: Sequence[Layout]
) -> list[Selection]:
    role = bundle.role(name)
    able = {variant.name: variant for variant in role.variants if _layout(variant, layouts)}
    if not able:
        raise InputError(
            f"{bundle.path}: no variant of role '{name}' has a graph in {_spelled(layouts)}; it "
            f"has {[variant.name for variant in role.variants]}. {_convert(bundle)}"
        )
    if precisions is None:
        default = bundle.variant(name)
        if default.name in able:
            return [_selection(name, default, layouts)]
        best = next(iter(able.values()))
        note = (
            f"{name}: {best.name} is exported in place of the default {default.name}, which has no "
            f"graph in {_spelled(layouts)}"
        )
        return [_selection(name, best, layouts, note)]
    found: dict[str, Selection] = {}
    for precision in precisions:
        exact = able.get(precision)
        variant = exact or next((v for v in able.values() if v.precision.value == precision), None)
        if variant is not None:
            found[variant.name] = _selection(name, variant, layouts)
    return list(found.values())


def _selection(role: str, variant: Variant, layouts: Sequence[Layout], note: str = "") -> Selection:
    layout = _layout(variant, layouts)
    assert layout is not None  # noqa: S101, only such variants come here
    return Selection(role, variant, layout, note)


def _layout(variant: Variant, layouts: Sequence[Layout]) -> Layout | None:
    return next((layout for layout in layouts if layout in variant.models), None)


def _answers(variant: Variant, precision: str) -> bool:
    return precision in (variant.name, variant.precision.value)


def _exportable(role: Role, layouts: Sequence[Layout]) -> list[str]:
    return [variant.name for variant in role.variants if _layout(variant, layouts)]


def _nowhere(
    bundle: Bundle, roles: Sequence[str], precision: str, layouts: Sequence[Layout]
) -> str:
    held = any(
        _answers(variant, precision) for role in roles for variant in bundle.role(role).variants
    )
    if not held:
        return bundle.no_variant(precision, roles)
    listed = "; ".join(f"{role}: {_exportable(bundle.role(role), layouts)}" for role in roles)
    return (
        f"{bundle.path}: '{precision}' has no graph in {_spelled(layouts)}, which is what can be "
        f"exported: {listed}. Name one of those. {_convert(bundle)}"
    )


def _spelled(layouts: Sequence[Layout]) -> str:
    return f"the layout {' or '.join(layouts)}"


def _convert(bundle: Bundle) -> str:
    return (
        "Or convert again for engines: mmedge convert "
        f"{bundle.manifest.provenance.source} --target tensorrt -o NAME.mmedge"
    )
