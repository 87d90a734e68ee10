"""Model families. One file a family, one line here."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from mmedge.errors import SourceError

if TYPE_CHECKING:
    from mmedge.converters.families.base import Family
    from mmedge.converters.sources.config import Fields
    from mmedge.converters.sources.source import Source

__all__ = ["ENTRY_POINTS", "FAMILIES", "MODEL_TYPES", "check_supported", "family_of", "offered"]

# One line a family: its module and the object in it.
FAMILIES: dict[str, str] = {
    "align": "mmedge.converters.families.align:FAMILY",
    "altclip": "mmedge.converters.families.altclip:FAMILY",
    "causal_lm": "mmedge.converters.families.causal_lm:FAMILY",
    "chinese_clip": "mmedge.converters.families.chinese_clip:FAMILY",
    "clap": "mmedge.converters.families.clap:FAMILY",
    "clip": "mmedge.converters.families.clip:FAMILY",
    "dinov2": "mmedge.converters.families.dinov2:FAMILY",
    "eva_clip": "mmedge.converters.families.eva_clip:FAMILY",
    "metaclip_2": "mmedge.converters.families.clip:METACLIP_2",
    "onnx": "mmedge.converters.families.onnx_graph:FAMILY",
    "open_clip": "mmedge.converters.families.open_clip:FAMILY",
    "owlv2": "mmedge.converters.families.owlvit:OWLV2",
    "owlvit": "mmedge.converters.families.owlvit:OWLVIT",
    "resnet": "mmedge.converters.families.resnet:FAMILY",
    "rt_detr": "mmedge.converters.families.rt_detr:RT_DETR",
    "rt_detr_v2": "mmedge.converters.families.rt_detr:RT_DETR_V2",
    "sentence_transformers": "mmedge.converters.families.sentence_transformers:FAMILY",
    "siglip": "mmedge.converters.families.siglip:FAMILY",
    "siglip2": "mmedge.converters.families.siglip:NAFLEX",
    "vit": "mmedge.converters.families.vit:FAMILY",
    "xclip": "mmedge.converters.families.xclip:FAMILY",
}
# Values of `model_type` that a family takes, where they are not just its name.
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "causal_lm": (
        "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt",
        "qwen2", "qwen3",
    ),
    "clip": ("clip", "clip_text_model", "clip_vision_model"),
    "dinov2": ("dinov2", "dinov2_with_registers",),
    "eva_clip": (),  # `clip`, too: its class decides
    "metaclip_2": ("metaclip_2", "metaclip_2_text_model", "metaclip_2_vision_model"),
    "sentence_transformers": (
        "bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta",
    ),
    "siglip": ("siglip", "siglip_text_model", "siglip_vision_model"),
    "siglip2": ("siglip2", "siglip2_text_model", "siglip2_vision_model"),
}  # fmt: skip
ENTRY_POINTS = "mmedge.families"
"""Entry-point group through which other packages offer families: name = "module:object"."""

_NEAREST, _ALIKE = 4, 0.6
# Families for the end of a class's name in `architectures`.
_HEADS = {"ForCausalLM": "causal_lm", "LMHeadModel": "causal_lm", "ForImageClassification": "vit"}


def offered() -> dict[str, str]:
    """Return the families by name, as "module:object": mmedge's and those of other packages."""
    return FAMILIES | {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def check_supported(config: Fields) -> None:
    """Check that a family takes an architecture, without importing any.

    Families of other packages are not known before they are imported, so with one installed nothing
    is refused here.

    Raises:
        SourceError: If none does; the nearest that one takes are named.
    """
    name = config.text("model_type")
    if name in _types() or offered().keys() != FAMILIES.keys():
        return
    raise _unsupported(str(config.file), name, _nearest(name, config.values.get("architectures")))


def _types() -> list[str]:
    return [kind for family in FAMILIES for kind in MODEL_TYPES.get(family, (family,))]


def _nearest(name: str, classes: object) -> list[str]:
    """Return the architectures most like one: by name, then those of the same kind of class."""
    found = difflib.get_close_matches(name, _types(), _NEAREST, _ALIKE)
    stems = classes if isinstance(classes, list) else []
    for end, family in _HEADS.items():
        if any(str(each).endswith(end) for each in stems):
            found += MODEL_TYPES.get(family, (family,))
    return list(dict.fromkeys(found))


def _unsupported(source: str, name: str, nearest: list[str]) -> SourceError:
    hint = f"The nearest that it can: {', '.join(nearest)}. " if nearest else ""
    return SourceError(
        f"{source} is of the architecture {name[:80]!r}, which mmedge cannot convert. {hint}"
        f"Supported families: {', '.join(sorted(offered()))}."
    )


def family_of(source: Source) -> Family:
    """Return the family that a source belongs to.

    Raises:
        SourceError: If there is none; the message names the nearest and the supported ones.
    """
    for place in offered().values():
        module, name = place.split(":")
        family = cast("Family", getattr(importlib.import_module(module), name))
        if family.matches(source):
            return family
    nearest = _nearest(source.model_type, source.config.get("architectures"))
    raise _unsupported(source.name, source.model_type, nearest)
