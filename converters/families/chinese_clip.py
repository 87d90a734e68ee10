"""Chinese-CLIP: CLIP's image tower beside a Chinese BERT (Yang et al., 2022)."""

from __future__ import annotations

from mmedge.converters.families.bert_text import BertTextFamily

__all__ = ["FAMILY"]


class ChineseClip(BertTextFamily):
    """Chinese-CLIP, texts without a limit of their own cut at the model's positions."""

    name = "chinese_clip"


FAMILY = ChineseClip()
