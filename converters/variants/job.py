"""Shared state of one conversion, and the inputs of its roles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from mmedge.bundle.manifest import Layout
from mmedge.bundle.quality import Quality
from mmedge.bundle.tensors import CallerFeed
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.checks import Data
from mmedge.converters.data.feeds import Samples, missing_data, role_feeds
from mmedge.converters.data.synthetic import synthetic_items
from mmedge.converters.evaluation.base import Evaluation
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.graphs.parity import probe_role
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.statistics.collect import Feeds
from mmedge.converters.variants.builder import BuiltVariant, RoleInputs, VariantBuilder
from mmedge.preprocess.registry import Processor
from mmedge.specs import Array

__all__ = ["Job"]

_GOLDEN_SAMPLES = 4


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        config: Its settings.
        folder: The bundle in the making.
        model: What is converted.
        processors: Open, by name.
        data: Calibration and evaluation data.
        evaluation: Evaluation of the variants.
        progress: Progress callback.
        space: Embedding-space fingerprint of fp32.
        weights_sha256: Hash of the weights.
        jpeg_draft: What the JPEG draft changes; None where it is not chosen.
    """

    config: ConvertConfig
    folder: Path
    model: ModelSpec
    processors: Mapping[str, Processor]
    data: Data
    evaluation: Evaluation
    progress: Progress
    space: str
    weights_sha256: str
    jpeg_draft: Quality | None = None

    def builder(
        self,
        name: str,
        spec: RoleSpec,
        fp32: Mapping[Layout, Path],
        before: Mapping[str, BuiltVariant],
    ) -> VariantBuilder:
        """Return the builder of a role's variants.

        Args:
            name: Of the role.
            spec: The role.
            fp32: Its fp32 graph by layout.
            before: fp32 of the roles before it, which may feed it.
        """
        reference = {role: variant.collected for role, variant in before.items()}
        inputs = RoleInputs(
            probes=probe_role(spec),
            golden=self._golden(spec, before),
            evaluation=self.evaluation,
            reference=reference,
            started=lambda variant: self._counter(
                f"Measure {name} {variant}", self.evaluation.size(spec)
            ),
        )
        return VariantBuilder(
            name,
            fp32["portable"].parent,
            fp32,
            spec,
            inputs,
            self.calibration(name, spec),
            explain=self.config.explain,
            seed=self.config.seed,
            report=partial(_report_steps, self.progress),
        )

    def _golden(self, spec: RoleSpec, before: Mapping[str, BuiltVariant]) -> dict[str, Array]:
        """Return one batch of synthetic samples: golden inputs contain no user data."""
        seed = self.config.seed + 1
        items = {
            name: synthetic_items(self.processors[name].config, _GOLDEN_SAMPLES, seed, self.folder)
            for name in spec.processors
        }
        sizes = {
            name: max(axis.min, min(_GOLDEN_SAMPLES, axis.max)) for name, axis in spec.axes.items()
        }
        drawn = spec.sample(sizes, seed)
        arrays = {
            name: drawn[name].numpy()
            for name, feed in spec.feeds.items()
            if isinstance(feed, CallerFeed)
        }
        samples = Samples(items, arrays, {name: one.golden for name, one in before.items()})
        if not items and arrays:
            return {item.name: drawn[item.name].numpy() for item in spec.inputs}
        return next(role_feeds(spec, self.processors, samples, batch=_GOLDEN_SAMPLES))

    def calibration(self, name: str, spec: RoleSpec) -> Feeds | None:
        """Return a factory of a role's calibration feeds, None without data for it."""
        data = self.data.calibration
        if data is None:
            return None
        samples = Samples.of(data, self.processors)
        if missing_data(spec, samples) is not None:
            return None
        total = samples.count(spec)

        def feeds() -> Iterable[Mapping[str, Array]]:
            advance = self._counter(f"Calibrate {name}", total)
            for feed in role_feeds(spec, self.processors, samples):
                yield feed
                for _ in next(iter(feed.values())):
                    advance()

        return feeds

    def without_calibration(self, specs: Mapping[str, RoleSpec]) -> list[str]:
        """Return notes on variants skipped for lack of calibration data."""
        names = [name for name, spec in specs.items() if self.calibration(name, spec) is None]
        left_out = ["their layers were not measured"] if self.config.explain else []
        if self.config.searches:
            left_out.append(
                "methods that need calibration data, such as static int8, were not tried"
            )
        if not names or not left_out:
            return []
        data = self.data.calibration
        if data is None:
            why = "Pass --calibration FOLDER."
        else:
            missing = missing_data(specs[names[0]], Samples.of(data, self.processors))
            why = f"{data.name} has no {str(missing).removeprefix('an ')}."
        return [f"{', '.join(names)}: {' and '.join(left_out)}. {why}"]

    def stage(self, what: str) -> None:
        """Report that a stage begins."""
        self.progress(ProgressEvent(what, 0, 1))

    def _counter(self, stage: str, total: int) -> Callable[[], None]:
        """Return a function that reports one more step of a stage each time it is called."""
        steps = count(1)
        return lambda: self.progress(ProgressEvent(stage, next(steps), max(total, 1)))


def _report_steps(progress: Progress, what: str, done: int, total: int) -> None:
    """Report a step of a stage with several steps."""
    if total > 1:
        progress(ProgressEvent(what, done, total))
