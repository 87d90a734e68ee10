"""Evaluations of a dual encoder over samples that are never read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bundles

from mmedge.bundle.kinds import DualEncoderKind
from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.embedding import Retrieval
from mmedge.converters.families.base import ModelSpec
from mmedge.preprocess.registry import open_processor
from mmedge.specs import Modality

__all__ = ["retrieval"]

KIND = DualEncoderKind(
    encoders={Modality.IMAGE: "image_encoder", Modality.TEXT: "text_encoder"},
    embedding_dim=bundles.DIM,
)


def retrieval(
    folder: Path,
    count: int,
    captions: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    template: str = "a {}",
) -> Retrieval:
    """Return the evaluation of `count` images with captions and labels.

    Args:
        folder: Where the tokenizer is written.
        count: Images; their files need not exist. 0 for no data.
        captions: One for each image, or None.
        labels: One for each image, or None.
        template: Prompt template.
    """
    (folder / "tokenizer.json").write_text(bundles.tokenizer_json(), encoding="utf-8")
    processors = {
        name: open_processor(config, folder) for name, config in bundles.PROCESSORS.items()
    }
    samples = tuple(
        Sample(
            image=folder / f"{index}.png",
            caption=None if captions is None else captions[index],
            label=None if labels is None else labels[index],
        )
        for index in range(count)
    )
    data = Dataset("held-out", samples) if count else None
    return Retrieval(Subject(ModelSpec(KIND, (), {}), processors, folder, data, template, 0))
