"""ALIGN: an EfficientNet beside a BERT, trained on noisy captions (Jia et al., 2021)."""

from __future__ import annotations

from typing import Any

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.bert_text import BertTextFamily
from mmedge.converters.sources.source import Source

__all__ = ["FAMILY"]


class Align(BertTextFamily):
    """ALIGN, whose image embedding is pooled and not projected."""

    name = "align"

    def model_class(self, source: Source) -> str:  # noqa: ARG002
        """Return the class by its name: the usual way to it wants fused attention."""
        return "AlignModel"

    def head(self, model: Any) -> ContrastiveHead:  # noqa: ANN401, transformers is untyped
        """Return a softmax over similarities divided by the temperature."""
        return ContrastiveHead(activation="softmax", logit_scale=1 / float(model.temperature))


FAMILY = Align()
