"""From a model to a bundle, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from mmedge.bundle import create_bundle
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.checks import Data, load_data, plan_role
from mmedge.converters.data.datasets import Dataset
from mmedge.converters.described import Described
from mmedge.converters.evaluation.base import Subject, open_evaluation
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.reference import check_reference
from mmedge.converters.families.taps import with_taps
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import DynamicInt8, StaticInt8
from mmedge.converters.methods.recipes import FP32, Recipe
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.quantization.sensitivity import quantizable_nodes
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.report import ConversionReport, RoleDefault
from mmedge.converters.sources.frozen import embedding_space, freeze
from mmedge.converters.tuning.defaults import choose_defaults, searched_default
from mmedge.converters.tuning.joint import (
    StartedSearch,
    add_pareto_front,
    choose_together,
    remember_backends,
    search_key,
    search_notes,
)
from mmedge.converters.tuning.jpeg_draft import choose_jpeg_draft
from mmedge.converters.tuning.pareto import Budget
from mmedge.converters.tuning.role import no_candidate_message
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import BuiltVariant, lay_out
from mmedge.converters.variants.describe import BuiltRole, judge
from mmedge.converters.variants.job import Job
from mmedge.converters.writing import write_bundle
from mmedge.errors import ConversionError

__all__ = ["convert_model"]


@dataclass(frozen=True)
class _Made:
    """Specs, graphs, defaults and notes of the converted roles."""

    specs: Mapping[str, RoleSpec]
    roles: Mapping[str, BuiltRole]
    defaults: Mapping[str, RoleDefault]
    notes: Sequence[str]


def convert_model(
    config: ConvertConfig,
    data: Mapping[str, Dataset],
    described_by: Callable[[], Described],
    progress: Progress,
) -> ConversionReport:
    """Convert a described model to a bundle, atomically.

    Args:
        config: Settings.
        data: From `read_data`.
        described_by: Describes the source; called once the place and the samples are checked.
        progress: Progress callback.

    Raises:
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    started = time.monotonic()
    with (
        ExitStack() as kept,
        create_bundle(config.out, overwrite=config.overwrite) as folder,
        quiet_libraries(),
    ):
        checked = load_data(config, data, progress)
        described = described_by()
        job = _open(config, folder, described, checked, progress)
        made = _search(job, kept) if config.searches else _build(job)
        job, draft_notes = choose_jpeg_draft(job, made.roles)
        manifest, lines = write_bundle(
            job, described.source, described.family, made.roles, made.defaults
        )
    if config.searches:
        remember_backends(manifest)
    return ConversionReport(
        path=config.out,
        family=described.family,
        variants=lines,
        defaults=made.defaults,
        notes=(
            *described.source.notes,
            *checked.notes,
            *made.notes,
            *draft_notes,
            *job.without_calibration(made.specs),
        ),
        calibration_samples=manifest.provenance.calibration_samples,
        duration_s=time.monotonic() - started,
        skipped=checked.skipped,
        searched={name: role for name, role in manifest.roles.items() if role.search is not None},
    )


def _open(
    config: ConvertConfig, folder: Path, described: Described, data: Data, progress: Progress
) -> Job:
    """Freeze the preprocessing, open the evaluation and reject invalid requests."""
    model = with_taps(described.model, config.taps)
    progress(ProgressEvent("Check the preprocessing", 0, 1))
    compared = model.reference_processors and described.source.weight_files
    source = described.source if compared else None
    processors = freeze(source, model.processors, model.files, folder)
    for name, reference in model.references.items():
        check_reference(described.source, name, model.roles[name](), processors, reference)
    evaluation = open_evaluation(
        Subject(model, processors, folder, data.evaluation, config.template, config.seed)
    )
    if config.metric is not None:
        evaluation.check_metric(config.metric)
    config.require_roles(model.roles)
    space = embedding_space(
        described.family,
        described.weights_sha256,
        described.computed,
        model.processors,
        model.files,
    )
    return Job(
        config, folder, model, processors, data, evaluation, progress, space,
        described.weights_sha256,
    )  # fmt: skip


def _build(job: Job) -> _Made:
    """Export every role and build the named variants."""
    specs: dict[str, RoleSpec] = {}
    roles: dict[str, BuiltRole] = {}
    fp32: dict[str, BuiltVariant] = {}
    notes: list[str] = []
    for name, make in job.model.roles.items():
        spec = make()
        plan, left_out = plan_role(job.config, job.data, name, spec, job.processors)
        notes += left_out
        roles[name] = _build_role(job, name, spec, plan, fp32, notes)
        fp32[name] = roles[name].variants[0]
        # Free the weights: from here on only the description of a role is needed.
        specs[name] = replace(spec, module=None)
    judged = {
        name: replace(
            role,
            qualities={
                variant.recipe.variant: judge(name, variant, roles, job.evaluation)
                for variant in role.variants
            },
        )
        for name, role in roles.items()
    }
    job.stage("Choose what load() takes")
    return _Made(specs, judged, choose_defaults(job, judged), notes)


def _build_role(
    job: Job,
    name: str,
    spec: RoleSpec,
    plan: Sequence[Recipe],
    before: Mapping[str, BuiltVariant],
    notes: list[str],
) -> BuiltRole:
    portable = job.folder / name / "fp32.onnx"
    job.stage(f"Export {name}")
    export_role(name, spec, portable)
    with closing(job.builder(name, spec, lay_out(portable), before)) as builder:
        variants = []
        for recipe in (FP32, *(recipe for recipe in plan if recipe != FP32)):
            named = recipe.variant in job.config.of_role(name)
            if not named and _takes_nothing(recipe, plan, portable):
                notes.append(
                    f"{name}: no {recipe.variant}, which takes products with a constant matrix; "
                    "the graph has none."
                )
                continue
            job.stage(f"Make {name} {recipe.variant}")
            variants.append(builder.build(recipe))
    return BuiltRole(replace(spec, module=None), builder.inputs.golden, tuple(variants))


def _takes_nothing(recipe: Recipe, plan: Sequence[Recipe], model: Path) -> bool:
    """Return whether dynamic int8 has nothing to quantize, and static int8 of the plan has."""
    static = [m for other in plan for m in other.methods.values() if isinstance(m, StaticInt8)]
    return any(
        isinstance(method, DynamicInt8)
        and not quantizable_nodes(model, method)
        and any(quantizable_nodes(model, other) for other in static)
        for method in recipe.methods.values()
    )


def _search(job: Job, kept: ExitStack) -> _Made:
    """Export every role and search for its precision; finished candidates survive a kill."""
    metric = job.config.metric or job.evaluation.default_metric()
    budget = Budget(metric, job.config.max_drop, job.config.objective)
    folder = job.config.out.with_name(f".{job.config.out.name}.search")
    store = kept.enter_context(TrialStore(folder, search_key(job)))
    specs = {name: make() for name, make in job.model.roles.items()}
    with ExitStack() as stack:
        started: dict[str, StartedSearch] = {}
        fp32: dict[str, BuiltRole] = {}
        for name, spec in specs.items():
            before = {other: role.variants[0] for other, role in fp32.items()}
            started[name] = StartedSearch.start(job, name, spec, store, budget, before, stack)
            fp32[name] = started[name].role
        try:
            tried = {name: search.run(fp32, job) for name, search in started.items()}
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"Finished candidates are stored in {folder}; run the same command to resume."
            ) from error
        job.stage("Choose the variants")
        if message := no_candidate_message(tried, budget):
            raise ConversionError(message)
        chosen, joint = choose_together(tried, fp32, job.evaluation, budget)
        roles = {
            name: add_pareto_front(job, fp32[name], trials, budget, chosen[name], joint)
            for name, trials in tried.items()
        }
    defaults = {
        name: searched_default(trials[0], chosen[name], budget) for name, trials in tried.items()
    }
    return _Made(specs, roles, defaults, search_notes(budget, roles))
