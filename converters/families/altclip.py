"""AltCLIP: CLIP's image tower beside a multilingual XLM-RoBERTa (Chen et al., 2022)."""

from __future__ import annotations

from mmedge.converters.families.bert_text import BertTextFamily

__all__ = ["FAMILY"]


class AltClip(BertTextFamily):
    """AltCLIP, whose positions begin behind the id of the padding token."""

    name = "altclip"
    first_position = 2


FAMILY = AltClip()
