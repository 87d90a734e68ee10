"""Choice of the JPEG draft: files decoded at a fraction of their size, if little is lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from mmedge.bundle.quality import Quality
from mmedge.converters.evaluation.base import Evaluation
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.tuning.pareto import Budget
from mmedge.converters.variants.builder import running_layout
from mmedge.converters.variants.describe import BuiltRole
from mmedge.converters.variants.job import Job
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.decode import frame_size
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.steps import Decode
from mmedge.specs import Compare

__all__ = ["choose_jpeg_draft"]

_LEAST_FILES = 16


@dataclass(frozen=True)
class _Measured:
    """What the draft does to one role.

    Attributes:
        quality: fp32 on drafts, compared with fp32 on whole files.
        within: Whether the loss is within the budget, and embeddings may share an index.
        words: The loss, for people.
    """

    quality: Quality
    within: bool
    words: str


def choose_jpeg_draft(job: Job, roles: Mapping[str, BuiltRole]) -> tuple[Job, tuple[str, ...]]:
    """Decode JPEG files at a fraction of their size if fp32 loses no more than the budget.

    It is measured on the evaluation data as a quantization is.

    Args:
        job: The conversion.
        roles: Every role with its fp32 outputs.

    Returns:
        The job, with the draft in its image processors if chosen; notes on the choice.
    """
    if job.config.jpeg_draft == "off":
        return job, ()
    drafts = {
        name: ImageProcessor(_with_draft(one.config))
        for name, one in job.processors.items()
        if isinstance(one.config, ImageConfig)
    }
    reduced = sum(_reduced(job.evaluation, name, draft) for name, draft in drafts.items())
    if reduced < _LEAST_FILES:
        side = max((draft.least_side for draft in drafts.values()), default=0)
        note = (
            f"JPEG draft: off. {reduced} images of the evaluation data are JPEG files large enough "
            f"to be decoded smaller (shorter side of {2 * side} pixels or more), expected "
            f"{_LEAST_FILES}. Pass such files with --evaluate."
        )
        return job, (note,)
    job.stage("Measure the JPEG draft")
    evaluation = copy.copy(job.evaluation)
    processors = {**evaluation.subject.processors, **drafts}
    evaluation.subject = replace(evaluation.subject, processors=processors)
    fed = [name for name, role in roles.items() if drafts.keys() & {*role.spec.processors}]
    with closing(Worker()) as worker:
        measured = {name: _measure(job, name, roles, evaluation, worker) for name in fed}
    found = "; ".join(f"{name} {one.words}" for name, one in measured.items())
    about = f"{found}, {reduced} files decoded smaller"
    if not all(one.within for one in measured.values()):
        return job, (f"JPEG draft: off, over the accuracy budget ({about}).",)
    chosen = {name: draft.config for name, draft in drafts.items()}
    model = replace(job.model, processors={**job.model.processors, **chosen})
    quality = next(iter(measured.values())).quality
    return replace(job, model=model, jpeg_draft=quality), (f"JPEG draft: on ({about}).",)


def _with_draft(config: ImageConfig) -> ImageConfig:
    steps = tuple(
        step.model_copy(update={"jpeg_draft": True}) if isinstance(step, Decode) else step
        for step in config.steps
    )
    return config.model_copy(update={"steps": steps})


def _reduced(evaluation: Evaluation, name: str, draft: ImageProcessor) -> int:
    """Count the images that are decoded smaller."""
    decoded = (draft.decode(item) for item in evaluation.samples.items[name])
    return sum(frame_size(image) != image.size for image in decoded)


def _measure(
    job: Job, name: str, roles: Mapping[str, BuiltRole], evaluation: Evaluation, worker: Worker
) -> _Measured:
    fp32, spec = roles[name].variants[0], roles[name].spec
    reference = {other: role.reference for other, role in roles.items()}
    graph_file = list(fp32.models.values())[running_layout(fp32.models)]
    with worker.open(graph_file, f"{name}/fp32") as graph:
        feeds = evaluation.feeds(spec, reference, batched=True)
        outputs = evaluation.collect(spec, graph.run, feeds, lambda: None, reference)
    quality = evaluation.quality(name, spec, reference, outputs)
    metric = job.config.metric or job.evaluation.default_metric()
    drop = job.evaluation.drop(metric, quality)
    embeds = Compare.ROWS in spec.compare.values()
    within = Budget(metric, job.config.max_drop, job.config.objective).holds(drop)
    alike = not embeds or job.evaluation.interchangeable(quality)
    cosine = quality.value("cosine_mean")
    parts = [f"{metric} loss {drop.value:.4f}"]
    parts += [] if cosine is None else [f"mean cosine {cosine:.5f}"]
    parts += [] if alike else ["not interchangeable with whole files"]
    return _Measured(quality, within and alike, ", ".join(parts))
