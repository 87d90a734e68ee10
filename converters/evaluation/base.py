"""Evaluation of variants on held-out data, by kind of model."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np

from mmedge.bundle.quality import Figure, Quality
from mmedge.bundle.tensors import CallerFeed, RoleFeed
from mmedge.converters.data.datasets import Dataset
from mmedge.converters.data.feeds import Samples, missing_data, role_feeds
from mmedge.converters.data.synthetic import synthetic_items
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.errors import CalibrationError, ConversionError
from mmedge.preprocess.registry import Processor
from mmedge.specs import Array, Compare, did_you_mean

__all__ = [
    "EVALUATIONS",
    "SYNTHETIC",
    "Collected",
    "Evaluation",
    "Metric",
    "Subject",
    "all_metrics",
    "drop",
    "find_metric",
    "open_evaluation",
]

# One line a kind.
EVALUATIONS: dict[str, str] = {
    "detector": "mmedge.converters.evaluation.detection:Detection",
    "dual_encoder": "mmedge.converters.evaluation.embedding:Retrieval",
    "encoder": "mmedge.converters.evaluation.encoder:Encoding",
    "fused": "mmedge.converters.evaluation.classification:Classification",
    "generator": "mmedge.converters.evaluation.generation:Generation",
    "module": "mmedge.converters.evaluation.tensors:Tensors",
}

SYNTHETIC = 64
"""Synthetic samples where no data is given."""

Collected: TypeAlias = Mapping[str, Array]
"""Collected outputs of a role, one row for each sample, by name."""


@dataclass(frozen=True)
class Metric:
    """A metric for accuracy budgets; larger is better.

    Attributes:
        figure: Its name in `Quality.figures`.
        about: What it is, for people.
        agreement: Whether it is agreement with fp32, which is 1 for fp32.
        needs: What the model and the data must have for it; "" where any will do.
    """

    figure: str
    about: str
    agreement: bool
    needs: str = ""


@dataclass(frozen=True)
class Subject:
    """Roles and data of an evaluation.

    Attributes:
        model: The model.
        processors: Its processors, open.
        folder: Where the processors' files lie.
        data: Held-out data; None for synthetic samples.
        template: How a label becomes a text, "{}" standing for the label.
        seed: Random seed.
    """

    model: ModelSpec
    processors: Mapping[str, Processor]
    folder: Path
    data: Dataset | None
    template: str
    seed: int


class Evaluation(ABC):
    """Evaluation of one kind, shared by all roles and variants of a conversion.

    A role's variant is evaluated with the other roles in fp32, so that a loss is its own.
    """

    metrics: ClassVar[Mapping[str, Metric]]
    """Metrics by their `mmedge convert --metric` name."""

    batch: ClassVar[int] = 1
    """Samples in a feed of a graph that computes each sample alone, at most."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        data = subject.data
        self._given = Samples() if data is None else Samples.of(data, subject.processors)
        items = {
            name: self._given.items.get(name) or self.synthetic(name) for name in subject.processors
        }
        self.samples = replace(self._given, items=items)

    @abstractmethod
    def default_metric(self) -> str:
        """Return the default metric of a search."""

    @abstractmethod
    def available(self) -> tuple[str, ...]:
        """Return the names of the measurable metrics."""

    @abstractmethod
    def quality(
        self, role: str, spec: RoleSpec, reference: Mapping[str, Collected], candidate: Collected
    ) -> Quality:
        """Compare a variant of one role with fp32.

        Args:
            role: Its name.
            spec: The role.
            reference: Of fp32, by role.
            candidate: Of the variant.
        """

    def together(
        self,
        reference: Mapping[str, Collected],  # noqa: ARG002, for kinds of several roles
        candidate: Mapping[str, Collected],  # noqa: ARG002
    ) -> Mapping[str, Figure]:
        """Return the loss of each task figure with every role in a variant of its own."""
        return {}

    def interchangeable(self, quality: Quality) -> bool:  # noqa: ARG002, for embeddings
        """Return whether a variant's embeddings can share an index with those of fp32."""
        return False

    def synthetic(self, processor: str) -> Sequence[Any]:
        """Return synthetic samples for a processor."""
        config, subject = self.subject.processors[processor].config, self.subject
        return synthetic_items(config, SYNTHETIC, subject.seed, subject.folder)

    def rows(self, spec: RoleSpec) -> Samples:
        """Return the samples of a role; synthetic where the data has none for it."""
        if missing_data(spec, self.samples) is None:
            return self.samples
        drawn = [spec.sample(_ones(spec), seed) for seed in range(1, SYNTHETIC + 1)]
        arrays = {
            name: np.concatenate([one[name].numpy() for one in drawn])
            for name, feed in spec.feeds.items()
            if isinstance(feed, CallerFeed)
        }
        return replace(self.samples, arrays=arrays)

    def about(self, spec: RoleSpec) -> str:
        """Return a description of a role's evaluation data."""
        data = self.subject.data
        if data is None or missing_data(spec, self._given):
            return f"synthetic: {SYNTHETIC} samples"
        return f"{data.name}: {self.samples.count(spec)} samples"

    def feeds(
        self, spec: RoleSpec, reference: Mapping[str, Collected], *, batched: bool = False
    ) -> Iterator[Mapping[str, Array]]:
        """Yield the feeds of the samples, in their order.

        Args:
            spec: The role.
            reference: fp32 outputs of the roles that feed it.
            batched: Put `batch` samples into a feed, as far as the role's axis allows. For graphs
                that compute each sample alone: dynamic quantization chooses one range for a
                whole batch, so its figures at a larger one would be of another computation.

        Raises:
            CalibrationError: If a sample cannot be used.
        """
        samples = self.rows(spec)
        if any(isinstance(feed, RoleFeed) for feed in spec.feeds.values()):
            samples = replace(samples, outputs=reference)
        axis = spec.batch_axis
        size = min(self.batch, axis.max) if batched and axis is not None else 1
        return role_feeds(spec, self.subject.processors, samples, batch=size)

    def size(self, spec: RoleSpec) -> int:
        """Return the number of samples."""
        return self.rows(spec).count(spec)

    def collect(
        self,
        spec: RoleSpec,
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        feeds: Iterable[Mapping[str, Array]],
        advance: Callable[[], None],
        reference: Mapping[str, Collected],  # noqa: ARG002, for kinds of several roles
    ) -> dict[str, Array]:
        """Run a graph on every feed and collect the evaluated outputs.

        Args:
            spec: The role.
            run: Runs the graph.
            feeds: From `feeds`.
            advance: Called after each sample.
            reference: fp32 outputs of the roles before it.
        """
        kept: dict[str, list[Array]] = {}
        for feed in feeds:
            for name, output in run(feed).items():
                compare = spec.compared(name)
                if name not in spec.tapped and compare not in (Compare.NONE, Compare.UNORDERED):
                    kept.setdefault(name, []).append(self.keep(output, compare))
            for _ in range(1 if spec.batch_axis is None else len(next(iter(feed.values())))):
                advance()
        return {name: _joined(rows) for name, rows in kept.items()}

    def keep(self, output: Array, compare: Compare) -> Array:  # noqa: ARG002
        """Return the collected part of one output, rows first."""
        return output

    def check_metric(self, metric: str) -> None:
        """Check that the data can measure a metric.

        Raises:
            ConversionError: If the metric is unknown.
            CalibrationError: If the data cannot measure it.
        """
        find_metric(metric, self.metrics)
        if metric not in self.available():
            raise _unavailable(metric, self.metrics, self.available(), self._data_name())

    def drop(self, metric: str, quality: Quality | None) -> Figure:
        """Return the drop of a metric from fp32, with its 95 % interval.

        Of agreement with fp32 that is what is missing to 1; of a task figure it is fp32's figure
        less the variant's, and below 0 where the variant happens to be better. fp32 itself, which
        has no quality without a task, loses nothing.

        Raises:
            ConversionError: If the metric is unknown.
            CalibrationError: If the data could not measure it.
        """
        if quality is None:
            find_metric(metric, self.metrics)
            return Figure(value=0.0, low=0.0, high=0.0)
        return drop(metric, quality, self.metrics)

    def _data_name(self) -> str:
        return "synthetic samples" if self.subject.data is None else self.subject.data.name


def _joined(parts: Sequence[Array]) -> Array:
    """Join samples; outputs with a dynamic axis are padded with zeros, which change no figure."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    longest = np.max([part.shape for part in parts], axis=0)
    pads = [
        [(0, 0), *((0, most - got) for most, got in zip(longest[1:], part.shape[1:], strict=True))]
        for part in parts
    ]
    return np.concatenate([np.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])


def _ones(spec: RoleSpec) -> dict[str, int]:
    return {name: max(1, axis.min) for name, axis in spec.axes.items()}


def drop(metric: str, quality: Quality, metrics: Mapping[str, Metric]) -> Figure:
    """Return the drop of a metric; see Evaluation.drop."""
    asked = find_metric(metric, metrics)
    known = quality.figures if asked.agreement else quality.drops
    if asked.figure not in known:
        measured = [
            name
            for name, other in metrics.items()
            if other.figure in (quality.figures if other.agreement else quality.drops)
        ]
        raise _unavailable(metric, metrics, measured, quality.data)
    figure = known[asked.figure]
    if not asked.agreement:
        return figure
    return Figure(value=1 - figure.value, low=1 - figure.high, high=1 - figure.low)


def find_metric(metric: str, metrics: Mapping[str, Metric]) -> Metric:
    """Return a metric by its name.

    Raises:
        ConversionError: If it is unknown.
    """
    if metric not in metrics:
        raise ConversionError(
            f"Unknown metric: got '{metric}', expected one of {', '.join(metrics)}."
            + did_you_mean(metric, metrics)
        )
    return metrics[metric]


def _unavailable(
    metric: str, metrics: Mapping[str, Metric], available: Iterable[str], data: str
) -> CalibrationError:
    needs = metrics[metric].needs
    return CalibrationError(
        f"Metric '{metric}' cannot be measured on {data}"
        + (f": it needs {needs}" if needs else "")
        + f"; available: {', '.join(available)}. Give other data with --evaluate, or choose "
        "another metric."
    )


def evaluation_class(kind: str) -> type[Evaluation]:
    """Return the evaluation of a kind.

    Raises:
        ConversionError: If there is none.
    """
    if kind not in EVALUATIONS:
        raise ConversionError(
            f"Kind '{kind}' has no evaluation; expected one of {sorted(EVALUATIONS)}."
        )
    module, name = EVALUATIONS[kind].split(":")
    return cast("type[Evaluation]", getattr(importlib.import_module(module), name))


def all_metrics() -> dict[str, Metric]:
    """Return the metrics of every kind."""
    return {
        name: metric
        for kind in EVALUATIONS
        for name, metric in evaluation_class(kind).metrics.items()
    }


def open_evaluation(subject: Subject) -> Evaluation:
    """Open the evaluation of a model's kind.

    Raises:
        ConversionError: If the kind has none.
        CalibrationError: If the data is too little.
    """
    return evaluation_class(subject.model.kind.type)(subject)
