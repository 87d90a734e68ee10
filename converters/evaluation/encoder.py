"""Evaluation of lone encoders: agreement of embeddings, and of classes where there is a head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmedge.bundle.kinds import EncoderKind
from mmedge.bundle.quality import Quality
from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.converters.evaluation import classification, embedding
from mmedge.converters.evaluation.base import Collected, Metric, Subject
from mmedge.converters.evaluation.bootstrap import mean_figures
from mmedge.converters.families.base import RoleSpec
from mmedge.errors import CalibrationError
from mmedge.specs import Array, Compare, did_you_mean

__all__ = ["METRICS", "Encoding"]

_CLASSES = ("accuracy", "class-agreement")
METRICS: Mapping[str, Metric] = MappingProxyType(
    {name: classification.METRICS[name] for name in _CLASSES}
    | {
        name: metric
        for name, metric in embedding.METRICS.items()
        if metric.agreement and name != "index-recall"
    }
)


class Encoding(embedding.Retrieval):
    """Evaluation of one encoder alone: an image has a label of the model, or is in its folder."""

    metrics = METRICS

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        kind = subject.model.kind
        assert isinstance(kind, EncoderKind)  # noqa: S101, the registry's
        head = kind.class_head
        self._names = np.array(() if head is None else head.labels, object)
        self._truth = None if subject.data is None else self._labels_of(subject.data)

    def default_metric(self) -> str:
        """Return accuracy with labels, else class-agreement, without classes cosine-p1."""
        if not len(self._names):
            return "cosine-p1"
        return "class-agreement" if self._truth is None else "accuracy"

    def available(self) -> tuple[str, ...]:
        """Return agreement; of classes with a head, accuracy with labels too."""
        usable = _CLASSES if self._truth is not None else _CLASSES[1:]
        return (*(usable if len(self._names) else ()), *super().available())

    def keep(self, output: Array, compare: Compare) -> Array:
        """Return embeddings, and of logits the class alone."""
        return output.argmax(axis=-1) if compare is Compare.TOKENS else output

    def quality(
        self, role: str, spec: RoleSpec, reference: Mapping[str, Collected], candidate: Collected
    ) -> Quality:
        """Compare a variant with fp32, and its classes with fp32's and with the true ones."""
        quality = super().quality(role, spec, reference, candidate)
        if not len(self._names):
            return quality
        logits = spec.outputs[1].name
        fp32, ours = reference[role][logits], candidate[logits]
        agree = mean_figures({"class_agreement": (fp32 == ours).astype(np.float64)})
        figures, drops = {**quality.figures, **agree}, dict(quality.drops)
        if self._truth is not None:
            labelled = np.array([label is not None for label in self._truth])
            truth = np.array(self._truth, object)[labelled]
            right = [
                (self._names[classes[labelled]] == truth).astype(np.float64)
                for classes in (fp32, ours)
            ]
            figures |= mean_figures({"accuracy": right[1]})
            drops |= mean_figures({"accuracy": right[0] - right[1]})
        return quality.model_copy(update={"figures": figures, "drops": drops})

    def _labels_of(self, data: Dataset) -> tuple[str | None, ...] | None:
        """Return the label of each image, None where no image has one that the model knows.

        Raises:
            CalibrationError: If the model knows some of the labels only.
        """
        known = set(self._names)
        samples = [sample for sample in data.samples if sample.image is not None]
        labels = tuple(sample.label for sample in samples)
        if not any(labels):
            folders = tuple(_folder(sample) for sample in samples)
            labels = folders if set(folders) <= known else labels
        given = sorted({label for label in labels if label is not None})
        unknown = [label for label in given if label not in known]
        if unknown and len(unknown) < len(given):
            raise CalibrationError(
                f"{data.name}: the label '{unknown[0]}' is none of the model's {len(known)} labels."
                + did_you_mean(unknown[0], known)
                + " Use the model's own labels, which `mmedge inspect` counts and the manifest "
                "lists, or leave the label out."
            )
        return None if unknown or not given else labels


def _folder(sample: Sample) -> str:
    return Path(sample.image or "").parent.name
