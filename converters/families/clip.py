"""CLIP, MetaCLIP 2: two transformers, causal text pooled at its end (Radford et al., 2021)."""

from __future__ import annotations

from mmedge.converters.families.clip_text import ClipFamily
from mmedge.converters.sources.source import Source

__all__ = ["FAMILY", "METACLIP_2"]


class Clip(ClipFamily):
    """CLIP: with or without projections where a tower is alone."""

    name = "clip"
    class_prefix = "CLIP"

    def matches(self, source: Source) -> bool:
        """Return whether a source is a CLIP; BAAI's EVA-CLIP says so too, and names its class."""
        return super().matches(source) and source.config.get("architectures") != ["EvaCLIPModel"]


class MetaClip2(ClipFamily):
    """MetaCLIP 2: CLIP's towers with a multilingual vocabulary (Chuang et al., 2025)."""

    name = "metaclip_2"
    class_prefix = "MetaClip2"


FAMILY = Clip()
METACLIP_2 = MetaClip2()
