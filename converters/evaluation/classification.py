"""Evaluation of classifiers: accuracy with labels, and class agreement."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from mmedge.bundle.quality import Quality
from mmedge.converters.data.datasets import LABELS
from mmedge.converters.evaluation import tensors
from mmedge.converters.evaluation.base import Collected, Metric
from mmedge.converters.evaluation.bootstrap import mean_figures
from mmedge.converters.families.base import RoleSpec
from mmedge.specs import Array

__all__ = ["METRICS", "Classification"]

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric(
            "accuracy",
            "share of samples given their true class",
            agreement=False,
            needs="a label for each sample",
        ),
        "class-agreement": Metric("class_agreement", "share given fp32's class", agreement=True),
        **tensors.METRICS,
    }
)


class Classification(tensors.Tensors):
    """Evaluation of heads whose first output holds class scores along its last axis."""

    metrics = METRICS

    def default_metric(self) -> str:
        """Return accuracy with labels, else class-agreement."""
        return "class-agreement" if self._labels() is None else "accuracy"

    def available(self) -> tuple[str, ...]:
        """Return every metric; accuracy only with labels."""
        known = self._labels() is not None
        return tuple(name for name in super().available() if name != "accuracy" or known)

    def quality(
        self, role: str, spec: RoleSpec, reference: Mapping[str, Collected], candidate: Collected
    ) -> Quality:
        """Compare a variant with fp32, and both with the true classes."""
        quality = super().quality(role, spec, reference, candidate)
        output = spec.outputs[0].name
        fp32, ours = (rows[output].argmax(axis=-1) for rows in (reference[role], candidate))
        figures = {
            **quality.figures,
            **mean_figures({"class_agreement": (fp32 == ours).astype(np.float64)}),
        }
        drops = {}
        if (labels := self._labels()) is not None:
            right = [(rows == labels).astype(np.float64) for rows in (fp32, ours)]
            figures |= mean_figures({"accuracy": right[1]})
            drops = mean_figures({"accuracy": right[0] - right[1]})
        return quality.model_copy(update={"figures": figures, "drops": drops})

    def _labels(self) -> Array | None:
        data = self.subject.data
        return None if data is None else data.arrays.get(LABELS)
