"""Model families. One file a family, one line here."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from mmedge.errors import SourceError

if TYPE_CHECKING:
    from mmedge.converters.families.base import Family
    from mmedge.converters.sources.source import Source

__all__ = ["ENTRY_POINTS", "FAMILIES", "family_of", "offered"]

# One line a family: its module and the object in it.
FAMILIES: dict[str, str] = {
    "align": "mmedge.converters.families.align:FAMILY",
    "altclip": "mmedge.converters.families.altclip:FAMILY",
    "causal_lm": "mmedge.converters.families.causal_lm:FAMILY",
    "chinese_clip": "mmedge.converters.families.chinese_clip:FAMILY",
    "clap": "mmedge.converters.families.clap:FAMILY",
    "clip": "mmedge.converters.families.clip:FAMILY",
    "dinov2": "mmedge.converters.families.dinov2:FAMILY",
    "metaclip_2": "mmedge.converters.families.clip:METACLIP_2",
    "onnx": "mmedge.converters.families.onnx_graph:FAMILY",
    "open_clip": "mmedge.converters.families.open_clip:FAMILY",
    "owlv2": "mmedge.converters.families.owlvit:OWLV2",
    "owlvit": "mmedge.converters.families.owlvit:OWLVIT",
    "resnet": "mmedge.converters.families.resnet:FAMILY",
    "rt_detr": "mmedge.converters.families.rt_detr:FAMILY",
    "sentence_transformers": "mmedge.converters.families.sentence_transformers:FAMILY",
    "siglip": "mmedge.converters.families.siglip:FAMILY",
    "vit": "mmedge.converters.families.vit:FAMILY",
}
ENTRY_POINTS = "mmedge.families"
"""Entry-point group through which other packages offer families: name = "module:object"."""


def offered() -> dict[str, str]:
    """Return the families by name, as "module:object": mmedge's and those of other packages."""
    return FAMILIES | {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def family_of(source: Source) -> Family:
    """Return the family that a source belongs to.

    Raises:
        SourceError: If there is none; the message names the supported ones.
    """
    for place in offered().values():
        module, name = place.split(":")
        family = cast("Family", getattr(importlib.import_module(module), name))
        if family.matches(source):
            return family
    raise SourceError(
        f"{source.name} is of the architecture '{source.model_type}', which mmedge cannot convert. "
        f"Supported: {', '.join(sorted(offered()))}."
    )
