"""convert(): from a PyTorch model to a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from mmedge.bundle import Golden, create_bundle, describe_files, save_golden, write_manifest
from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import ContrastiveHead, Layout, Manifest, Quality
from mmedge.converters.config import ConvertConfig, recipes
from mmedge.converters.data.checks import Data, load_data, plan_role
from mmedge.converters.data.datasets import Dataset
from mmedge.converters.data.feeds import image_feeds, text_feeds
from mmedge.converters.evaluation.dataset import EvaluationSet, evaluation_set
from mmedge.converters.families import family_of
from mmedge.converters.families.base import ExportSpec, Family
from mmedge.converters.graphs.export import export_role, probe_role
from mmedge.converters.methods.recipes import FP32, Recipe
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.provenance import describe_provenance, tool_versions
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.report import ConversionReport, VariantReport
from mmedge.converters.request import check_request
from mmedge.converters.sources.fingerprint import computing_config, tensors_sha256
from mmedge.converters.sources.frozen import Frozen, freeze
from mmedge.converters.sources.source import Source, open_source
from mmedge.converters.statistics.collect import Feeds
from mmedge.converters.tuning.joint import (
    StartedSearch,
    choose_together,
    default_metric,
    placed,
    remember_backends,
    require_told,
    search_notes,
)
from mmedge.converters.tuning.pareto import Budget, Trial
from mmedge.converters.tuning.role import describe_search, nothing_found
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import BuiltVariant, RoleInputs, VariantBuilder, lay_out
from mmedge.converters.variants.describe import BuiltRole, describe_role, external_files, judge
from mmedge.errors import ConversionError
from mmedge.runtimes.processor import allowed_processors, processor_name
from mmedge.specs import Array, Modality

__all__ = ["convert"]

_GOLDEN_SAMPLES = 4
_GOLDEN_NAME = "golden.npz"


@dataclass(frozen=True)
class _Job:
    """What the steps of one conversion share; `kept` is closed when the bundle stands."""

    config: ConvertConfig
    folder: Path
    kept: ExitStack
    source: Source
    family: Family
    data: Data
    frozen: Frozen
    samples: EvaluationSet
    progress: Progress


@dataclass(frozen=True)
class _Facts:
    """What the loaded model says of itself."""

    head: ContrastiveHead
    dim: int
    space: str
    weights_sha256: str


def convert(config: ConvertConfig, progress: Progress | None = None) -> ConversionReport:
    """Convert a model to a bundle: all of it, or nothing.

    Args:
        config: What to convert, and to what.
        progress: Called as the work goes on, from the calling thread.

    Raises:
        ConversionError: If the source, the data or the model cannot be converted (SourceError,
            CalibrationError, ExportError, QuantizationError, ParityError).
        BackendError: If ONNX Runtime cannot run what was made.
        BundleError: If the bundle cannot stand at `config.out`.
        StorageError: If the disk is full or the place cannot be written.
    """
    started = time.monotonic()
    check_request(config)
    tell = progress or _say_nothing
    with (
        ExitStack() as kept,
        create_bundle(config.out, overwrite=config.overwrite) as folder,
        quiet_libraries(),
    ):
        job = _open(config, folder, kept, tell)
        work = _search if config.searches else _build
        facts, roles, notes = work(job)
        manifest, lines = _finish(job, facts, roles)
    if config.searches:
        remember_backends(manifest)
    return ConversionReport(
        path=config.out,
        family=job.family.name,
        variants=lines,
        notes=(*job.source.notes, *job.data.notes, *notes, *_uncalibrated(job, roles)),
        calibration_samples=_calibration_samples(job, roles),
        duration_s=time.monotonic() - started,
        skipped=job.data.skipped,
        searched={name: role for name, role in manifest.roles.items() if role.search is not None},
    )


def _say_nothing(_: ProgressEvent) -> None:
    return


def _open(config: ConvertConfig, folder: Path, kept: ExitStack, progress: Progress) -> _Job:
    """Read everything that can be refused before the work begins."""
    progress(ProgressEvent("Open the source", 0, 1))
    source = open_source(config.source, config.revision, merge_adapter=config.merge_adapter)
    family = family_of(source)
    data = load_data(config, progress)
    progress(ProgressEvent("Check the preprocessing", 0, 1))
    frozen = freeze(source, family, folder)
    samples = evaluation_set(
        data.evaluation,
        template=config.template,
        tokenizer_file=frozen.tokenizer_file,
        seed=config.seed,
    )
    if config.searches:
        require_told(_budget(config, samples).metric, samples)
    return _Job(config, folder, kept, source, family, data, frozen, samples, progress)


def _load(job: _Job) -> tuple[_Facts, dict[str, ExportSpec]]:
    """Load the model, and tell of it what the manifest needs."""
    job.progress(ProgressEvent("Load the weights", 0, 1))
    model = job.family.load(job.source)
    weights_sha256 = tensors_sha256(model)
    dim = job.family.embedding_dim(model)
    facts = _Facts(
        head=job.family.head(model),
        dim=dim,
        space=job.frozen.space(
            job.family.name, dim, weights_sha256, computing_config(model.config)
        ),
        weights_sha256=weights_sha256,
    )
    return facts, dict(job.family.roles(model))


def _build(job: _Job) -> tuple[_Facts, dict[str, BuiltRole], list[str]]:
    """Export every role and make the variants that were named."""
    facts, specs = _load(job)
    job.config.require_roles(specs)
    plans = {
        name: plan_role(job.config, job.data, name, spec.modality) for name, spec in specs.items()
    }
    roles: dict[str, BuiltRole] = {}
    for name, (plan, _) in plans.items():
        # Popped, so that each tower's weights are freed when it has been built.
        roles[name] = _build_role(job, name, specs.pop(name), plan)
    return facts, roles, [note for _, notes in plans.values() for note in notes]


def _search(job: _Job) -> tuple[_Facts, dict[str, BuiltRole], list[str]]:
    """Export every role and search for its precision; finished candidates outlive a kill."""
    facts, specs = _load(job)
    budget = _budget(job.config, job.samples)
    folder = job.config.out.with_name(f".{job.config.out.name}.search")
    store = job.kept.enter_context(TrialStore(folder, _search_key(job, facts)))
    with ExitStack() as stack:
        started = {
            name: _start_search(job, name, spec, store, budget, stack)
            for name, spec in specs.items()
        }
        fp32 = {name: search.role for name, search in started.items()}
        try:
            tried = {
                name: search.run(fp32, job.samples, job.progress)
                for name, search in started.items()
            }
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"What was tried is kept in {folder}; the same command goes on from there."
            ) from error
        job.progress(ProgressEvent("Choose what to keep", 0, 1))
        if message := nothing_found(tried, budget):
            raise ConversionError(message)
        chosen, joint = choose_together(tried, fp32, job.samples, budget)
        roles = {
            name: _take(job, started[name].role, trials, budget, chosen[name], joint)
            for name, trials in tried.items()
        }
    return facts, roles, search_notes(budget, roles)


def _budget(config: ConvertConfig, samples: EvaluationSet) -> Budget:
    metric = config.metric or default_metric(samples.known)
    return Budget(metric, config.max_drop, config.objective)


def _search_key(job: _Job, facts: _Facts) -> dict[str, object]:
    """Return what the candidates of a search depend on."""
    data = {
        what: None if dataset is None else dataset.sha256()
        for what, dataset in (
            ("calibration", job.data.calibration),
            ("evaluation", job.data.evaluation),
        )
    }
    return {
        "format": 2,  # of what the store holds
        "space": facts.space,
        "weights_sha256": facts.weights_sha256,
        **data,
        "template": job.config.template,
        "seed": job.config.seed,
        "explain": job.config.explain,
        "tools": tool_versions(),
        "processor": processor_name(),
        "processors": list(allowed_processors()),
    }


def _start_search(
    job: _Job,
    name: str,
    spec: ExportSpec,
    store: TrialStore,
    budget: Budget,
    stack: ExitStack,
) -> StartedSearch:
    portable = store.role_folder(name) / "fp32.onnx"
    job.progress(ProgressEvent(f"Export {name}", 0, 1))
    known = store.load(name, FP32, budget.metric)
    stored = None if known is None else known.built
    if stored is None:
        export_role(name, spec, portable)
    models = lay_out(portable) if stored is None else stored.models
    calibration = _calibration(job, name, spec.modality)
    builder = _builder(job, name, spec, models, calibration)
    stack.callback(builder.close)
    built = stored or builder.build(FP32)
    role = BuiltRole(spec.modality, spec.inputs, spec.outputs, builder.inputs.golden, (built,))
    return StartedSearch(name, role, builder, store, budget, calibrated=calibration is not None)


def _take(
    job: _Job,
    role: BuiltRole,
    trials: Sequence[Trial],
    budget: Budget,
    chosen: Trial,
    joint: Figure | None,
) -> BuiltRole:
    """Put the front of a search into the bundle."""
    record = describe_search(trials, budget, chosen, joint=joint)
    kept = {one.variant for one in record.candidates if one.verdict != "dropped"}
    variants = tuple(
        placed(trial.built, job.folder)
        for trial in trials
        if trial.built is not None and trial.name in kept
    )
    return replace(
        role,
        variants=variants,
        default=chosen.name,
        search=record,
        qualities={trial.name: trial.quality for trial in trials if trial.built is not None},
    )


def _build_role(job: _Job, name: str, spec: ExportSpec, plan: Sequence[Recipe]) -> BuiltRole:
    portable = job.folder / name / "fp32.onnx"
    job.progress(ProgressEvent(f"Export {name}", 0, 1))
    export_role(name, spec, portable)
    calibration = _calibration(job, name, spec.modality)
    builder = _builder(job, name, spec, lay_out(portable), calibration)
    with closing(builder):
        variants = []
        for recipe in (FP32, *(recipe for recipe in plan if recipe != FP32)):
            job.progress(ProgressEvent(f"Make {name} {recipe.variant}", 0, 1))
            variants.append(builder.build(recipe))
    return BuiltRole(
        spec.modality, spec.inputs, spec.outputs, builder.inputs.golden, tuple(variants)
    )


def _builder(
    job: _Job,
    name: str,
    spec: ExportSpec,
    fp32: Mapping[Layout, Path],
    calibration: Feeds | None,
) -> VariantBuilder:
    return VariantBuilder(
        name,
        fp32["portable"].parent,
        fp32,
        _inputs(job, name, spec),
        calibration,
        spec=spec,
        explain=job.config.explain,
        seed=job.config.seed,
        tell=partial(_tell_steps, job.progress),
    )


def _inputs(job: _Job, name: str, spec: ExportSpec) -> RoleInputs:
    total = job.samples.size(spec.modality)

    def started(variant: str) -> Callable[[], None]:
        return _counter(job.progress, f"Measure {name} {variant}", total)

    return RoleInputs(
        name=spec.inputs[0].name,
        probes=probe_role(spec),
        golden=job.frozen.golden(spec.modality, _GOLDEN_SAMPLES, job.config.seed + 1),
        feeds=lambda: job.samples.feeds(spec.modality, job.frozen.images, job.frozen.texts),
        started=started,
    )


def _calibration(job: _Job, role: str, modality: Modality) -> Feeds | None:
    """Return what starts the stream of a role's calibration feeds, None where there is no data."""
    data = job.data.calibration
    if data is None or (modality is Modality.TEXT and not data.captions):
        return None

    def feeds() -> Iterable[Mapping[str, Array]]:
        total = len(data.captions if modality is Modality.TEXT else data.samples)
        advance = _counter(job.progress, f"Calibrate {role}", total)
        for feed in _feeds(job, modality, data):
            yield feed
            for _ in next(iter(feed.values())):
                advance()

    return feeds


def _feeds(job: _Job, modality: Modality, data: Dataset) -> Iterable[Mapping[str, Array]]:
    if modality is Modality.TEXT:
        return text_feeds(data.captions, job.frozen.texts)
    return image_feeds(data.samples, job.frozen.images)


def _uncalibrated(job: _Job, roles: Mapping[str, BuiltRole]) -> list[str]:
    """Return notes on what was left out where a role has no calibration data."""
    data = job.data.calibration
    names = [n for n, role in roles.items() if _calibration(job, n, role.modality) is None]
    left_out = ["their layers were not measured"] if job.config.explain else []
    if job.config.searches:
        left_out.append("methods that need calibration data, such as static int8, were not tried")
    if not names or not left_out:
        return []
    why = "Pass --calibration FOLDER." if data is None else f"{data.name} has no captions."
    return [f"{', '.join(names)}: {' and '.join(left_out)}. {why}"]


def _tell_steps(progress: Progress, what: str, done: int, total: int) -> None:
    """Report a step of what has several; one alone would be a stage of its own."""
    if total > 1:
        progress(ProgressEvent(what, done, total))


def _counter(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Return a function that reports one more step of a stage each time it is called."""
    steps = count(1)
    return lambda: progress(ProgressEvent(stage, next(steps), total))


def _finish(
    job: _Job, facts: _Facts, roles: Mapping[str, BuiltRole]
) -> tuple[Manifest, tuple[VariantReport, ...]]:
    """Judge every variant, write golden vectors and manifest; return it and the summary."""
    job.progress(ProgressEvent("Write the manifest", 0, 1))
    # What was searched for is all kept; of what was named, fp32 may have been made only to compare.
    wanted = {name: {recipe.variant for recipe in recipes(job.config, name)} for name in roles}
    kept = {
        name: [v for v in role.variants if role.search or v.recipe.variant in wanted[name]]
        for name, role in roles.items()
    }
    _remove_unused(job.folder, roles, kept)
    save_golden(
        job.folder / _GOLDEN_NAME,
        Golden(
            inputs={name: {role.inputs[0].name: role.golden} for name, role in roles.items()},
            outputs={
                name: {
                    variant.recipe.variant: {roles[name].outputs[0].name: variant.golden}
                    for variant in variants
                }
                for name, variants in kept.items()
            },
        ),
    )
    qualities = {
        name: _qualities(roles[name], variants, roles, job.samples)
        for name, variants in kept.items()
    }
    files = describe_files(job.folder)
    manifest = Manifest(
        name=job.config.out.stem,
        family=job.family.name,
        tasks=job.family.tasks,
        embedding_dim=facts.dim,
        roles={
            name: describe_role(role, qualities[name], kept[name], facts.space, job.folder, files)
            for name, role in roles.items()
        },
        preprocessing=job.frozen.preprocessing,
        contrastive_head=facts.head,
        golden=_GOLDEN_NAME,
        files=files,
        provenance=describe_provenance(
            job.source,
            job.config,
            facts.weights_sha256,
            calibration_sha256=_calibration_sha256(job, roles),
            calibration_samples=_calibration_samples(job, roles),
        ),
    )
    write_manifest(job.folder, manifest)
    durations = {
        (name, variant.recipe.variant): variant.duration_s
        for name, variants in kept.items()
        for variant in variants
    }
    lines = tuple(
        VariantReport(
            role=name,
            variant=variant.name,
            size_bytes=variant.size_bytes,
            parity=variant.parity,
            quality=variant.quality,
            duration_s=durations[name, variant.name],
        )
        for name, role in manifest.roles.items()
        for variant in role.variants
    )
    return manifest, lines


def _qualities(
    role: BuiltRole,
    variants: Sequence[BuiltVariant],
    roles: Mapping[str, BuiltRole],
    samples: EvaluationSet,
) -> dict[str, Quality | None]:
    """Return what is known of each variant; a search has judged its own."""
    if role.search is not None:
        return dict(role.qualities)
    return {variant.recipe.variant: judge(role, variant, roles, samples) for variant in variants}


def _remove_unused(
    folder: Path, roles: Mapping[str, BuiltRole], kept: Mapping[str, list[BuiltVariant]]
) -> None:
    """Remove the fp32 graphs where fp32 was not asked for."""
    used = {
        path
        for variants in kept.values()
        for variant in variants
        for model in variant.models.values()
        for path in (model, *external_files(model))
    }
    used |= {variant.nodes for variants in kept.values() for variant in variants if variant.nodes}
    for name in roles:
        for path in (folder / name).iterdir():
            if path not in used:
                path.unlink()


def _calibration_sha256(job: _Job, roles: Mapping[str, BuiltRole]) -> str | None:
    used = _calibration_samples(job, roles)
    return job.data.calibration.sha256() if used and job.data.calibration else None


def _calibration_samples(job: _Job, roles: Mapping[str, BuiltRole]) -> int:
    """Return how many pictures ranges were chosen from; 0 where no variant needed any."""
    if job.data.calibration is None:
        return 0
    recipes_used = [variant.recipe for role in roles.values() for variant in role.variants]
    needed = job.config.explain or any(recipe.needs_calibration for recipe in recipes_used)
    return len(job.data.calibration.samples) if needed else 0
