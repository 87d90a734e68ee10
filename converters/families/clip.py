"""CLIP, MetaCLIP 2: two transformers, causal text pooled at its end (Radford et al., 2021)."""

from __future__ import annotations

from mmedge.converters.families.clip_text import ClipFamily

__all__ = ["FAMILY", "METACLIP_2"]


class Clip(ClipFamily):
    """CLIP: with or without projections where a tower is alone."""

    name = "clip"
    class_prefix = "CLIP"


class MetaClip2(ClipFamily):
    """MetaCLIP 2: CLIP's towers with a multilingual vocabulary (Chuang et al., 2025)."""

    name = "metaclip_2"
    class_prefix = "MetaClip2"


FAMILY = Clip()
METACLIP_2 = MetaClip2()
