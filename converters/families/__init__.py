"""Model families. One file a family, one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from mmedge.errors import SourceError

if TYPE_CHECKING:
    from mmedge.converters.families.base import Family
    from mmedge.converters.sources.source import Source

__all__ = ["FAMILIES", "family_of"]

# One line a family: its module, which offers `FAMILY`.
FAMILIES: dict[str, str] = {
    "clip": "mmedge.converters.families.clip",
    "siglip": "mmedge.converters.families.siglip",
}


def family_of(source: Source) -> Family:
    """Return the family that a source belongs to.

    Raises:
        SourceError: If there is none; the message names the supported ones.
    """
    for module in FAMILIES.values():
        family = cast("Family", importlib.import_module(module).FAMILY)
        if family.matches(source):
            return family
    raise SourceError(
        f"{source.name} is of the architecture '{source.model_type}', which mmedge cannot convert. "
        f"Supported: {', '.join(sorted(FAMILIES))}."
    )
