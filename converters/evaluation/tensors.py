"""Evaluation of arbitrary outputs: agreement with fp32, by output comparison."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from mmedge.bundle.differences import difference
from mmedge.bundle.quality import Quality
from mmedge.converters.evaluation.base import Collected, Evaluation, Metric
from mmedge.converters.evaluation.bootstrap import mean_figures, percentile_figure
from mmedge.converters.families.base import RoleSpec
from mmedge.specs import Array, Compare

__all__ = ["METRICS", "Tensors"]

# Values collected of one sample of an output that is compared by values.
_MAX_VALUES = 1 << 14

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "cosine-mean": Metric("cosine_mean", "mean cosine with fp32's output", agreement=True),
        "cosine-p1": Metric("cosine_p1", "first percentile of the cosine", agreement=True),
        "cosine-min": Metric("cosine_min", "smallest cosine with fp32", agreement=True),
        "value-agreement": Metric(
            "value_agreement", "1 - the error's norm over the fp32 output's, mean", agreement=True
        ),
        "token-agreement": Metric(
            "token_agreement",
            "share of rows with fp32's largest value",
            agreement=True,
            needs="an output that is compared by tokens",
        ),
    }
)


class Tensors(Evaluation):
    """Any outputs. With several, each sample counts by its worst output."""

    metrics = METRICS

    def default_metric(self) -> str:
        """Return value-agreement: the purpose of the outputs is unknown."""
        return "value-agreement"

    def available(self) -> tuple[str, ...]:
        """Return every metric; token-agreement where an output is compared by tokens."""
        compared = {
            c for make in self.subject.model.roles.values() for c in make().compare.values()
        }
        tokens = Compare.TOKENS in compared
        return tuple(name for name in self.metrics if name != "token-agreement" or tokens)

    def keep(self, output: Array, compare: Compare) -> Array:
        """Return rows; of a sample compared by values, at most 16384 values evenly spread."""
        if compare is not Compare.VALUES:
            return output.reshape(-1, output.shape[-1])
        flat = output.reshape(max(len(output) if output.ndim else 1, 1), -1)
        if flat.shape[1] <= _MAX_VALUES:
            return flat
        return flat[:, np.linspace(0, flat.shape[1] - 1, _MAX_VALUES).astype(np.int64)]

    def quality(
        self,
        role: str,
        spec: RoleSpec,
        reference: Mapping[str, Collected],
        candidate: Collected,
    ) -> Quality:
        """Compare a variant with fp32."""
        fp32 = reference[role]
        cosines, errors, agreements = [], [], []
        for name, expected in fp32.items():
            found = difference(expected, candidate[name], spec.compared(name))
            cosines.append(np.where(np.isfinite(found.cosines), found.cosines, -1.0))
            errors.append(_relative_errors(expected, candidate[name]))
            if found.agreements is not None:
                agreements.append(found.agreements.astype(np.float64))
        values = np.concatenate(cosines)
        figures = mean_figures(
            {"cosine_mean": values, "value_agreement": 1 - np.concatenate(errors)}
        )
        figures["cosine_p1"] = percentile_figure(values, 1)
        figures["cosine_min"] = percentile_figure(values, 0)
        if agreements:
            figures |= mean_figures({"token_agreement": np.concatenate(agreements)})
        return Quality(figures=figures, samples=len(values), data=self.about(spec))


def _relative_errors(expected: Array, got: Array) -> Array:
    """Return the norm of each row's error over that of the row, at most 1."""
    left, right = expected.astype(np.float64), got.astype(np.float64)
    norms = np.maximum(np.linalg.norm(left, axis=1), 1e-12)
    with np.errstate(all="ignore"):
        errors = np.linalg.norm(left - right, axis=1) / norms
    return np.where(np.isfinite(errors), np.minimum(errors, 1.0), 1.0)
