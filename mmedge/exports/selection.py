"""Selection of the graphs to export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmedge.bundle.manifest import Layout, Role, Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import InputError
from mmedge.runtimes.backends import PORTABLE_TARGET, backend
from mmedge.sessions.choice import engine_backend
from mmedge.sessions.preparation import unbuildable

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
    engines: bool = False,
) -> tuple[Selection, ...]:
    """Select the graphs to export.

    Args:
        bundle: An opened bundle.
        roles: Role names; None takes all.
        precisions: For each role every one of these that it has: exact names of variants, or
            precisions, for the variant of highest fidelity that can be exported. None takes the
            role's default, or the one of highest fidelity if the default cannot be exported, and
            says so in `note`.
        layouts: Layouts that can be exported, the preferred one first.
        engines: Prefer variants of which engines can be built, and say so in `note` where none
            can.

    Returns:
        In the order of the manifest, no graph twice.

    Raises:
        InputError: If there is no such role, if no role has a precision that is requested, or if
            a role has no variant that can be exported.
    """
    wanted = tuple(dict.fromkeys(roles)) if roles is not None else tuple(bundle.manifest.roles)
    for name in wanted:
        bundle.role(name)  # a wrong name is an error that lists the right ones
    wish = _Wish(bundle, precisions, layouts, engines)
    chosen = [each for name in bundle.manifest.roles if name in wanted for each in wish.of(name)]
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


@dataclass(frozen=True, slots=True)
class _Wish:
    """Export request for every role."""

    bundle: Bundle
    precisions: Sequence[str] | None
    layouts: Sequence[Layout]
    engines: bool

    def of(self, name: str) -> list[Selection]:
        role = self.bundle.role(name)
        able = {each.name: each for each in role.variants if _layout(each, self.layouts)}
        if not able:
            raise InputError(
                f"{self.bundle.path}: no variant of role '{name}' has a graph in "
                f"{_spelled(self.layouts)}; it has {[each.name for each in role.variants]}. "
                f"{_convert(self.bundle)}"
            )
        if self.precisions is None:
            return [self._default(name, able)]
        found: dict[str, Selection] = {}
        for precision in self.precisions:
            fitting = [each for each in able.values() if each.precision.value == precision]
            if precision in able:
                fitting = [able[precision]]
            if fitting:
                variant = next((each for each in fitting if self._good(each)), fitting[0])
                found[variant.name] = self._selection(name, variant)
        return list(found.values())

    def _default(self, name: str, able: Mapping[str, Variant]) -> Selection:
        default = self.bundle.variant(name)
        good = [each for each in able.values() if self._good(each)]
        if default.name in able and (default in good or not good):
            return self._selection(name, default)
        best = (good or list(able.values()))[0]
        fault = (
            f"of which {_builder()} builds no engine: {_refusal(default)}"
            if default.name in able
            else f"which has no graph in {_spelled(self.layouts)}"
        )
        note = f"{name}: {best.name} is exported in place of the default {default.name}, {fault}"
        return self._selection(name, best, note)

    def _good(self, variant: Variant) -> bool:
        return not self.engines or _refusal(variant) is None

    def _selection(self, role: str, variant: Variant, note: str = "") -> Selection:
        layout = _layout(variant, self.layouts)
        assert layout is not None  # noqa: S101, only such variants come here
        if not note and not self._good(variant):
            why = _refusal(variant)
            note = f"{role}/{variant.name}: {_builder()} builds no engine of it: {why}"
        return Selection(role, variant, layout, note)


def _builder() -> str:
    return backend(engine_backend()).title


def _refusal(variant: Variant) -> str | None:
    return unbuildable(variant, engine_backend())


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
        f"{bundle.manifest.provenance.source} --target {PORTABLE_TARGET} -o NAME.mmedge"
    )
