"""Writing of golden vectors and manifest."""

from __future__ import annotations

from collections.abc import Mapping

from mmedge.bundle import Golden, describe_files, save_golden, write_manifest
from mmedge.bundle.kinds import EmbeddingKind
from mmedge.bundle.manifest import Manifest
from mmedge.converters.config import recipes
from mmedge.converters.provenance import describe_provenance
from mmedge.converters.report import RoleDefault, VariantReport
from mmedge.converters.sources.source import Source
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import BuiltRole, describe_role, external_files
from mmedge.converters.variants.job import Job

__all__ = ["write_bundle"]

_GOLDEN_NAME = "golden.npz"


def write_bundle(
    job: Job,
    source: Source,
    family: str,
    roles: Mapping[str, BuiltRole],
    defaults: Mapping[str, RoleDefault],
) -> tuple[Manifest, tuple[VariantReport, ...]]:
    """Write golden vectors and manifest; return it and the summary.

    Args:
        job: The conversion; graphs and files lie in its folder.
        source: What was converted.
        family: The family's name.
        roles: Every role with its variants and their qualities.
        defaults: Default variant, by role.
    """
    job.stage("Write the manifest")
    # A search keeps all its variants; otherwise fp32 may have been built only as the reference.
    wanted = {name: {recipe.variant for recipe in recipes(job.config, name)} for name in roles}
    kept = {
        name: [v for v in role.variants if role.search or v.recipe.variant in wanted[name]]
        for name, role in roles.items()
    }
    _remove_unused(job, kept)
    save_golden(
        job.folder / _GOLDEN_NAME,
        Golden(
            inputs={name: role.golden for name, role in roles.items()},
            outputs={
                name: {variant.recipe.variant: variant.golden for variant in variants}
                for name, variants in kept.items()
            },
            steps={
                name: {variant.recipe.variant: variant.steps for variant in variants}
                for name, variants in kept.items()
            },
        ),
    )
    files = describe_files(job.folder)
    used = _calibration_samples(job, roles)
    manifest = Manifest(
        name=job.config.out.stem,
        family=family,
        tasks=job.model.tasks,
        kind=job.model.kind,
        roles={
            name: describe_role(
                role,
                job.evaluation,
                kept[name],
                defaults[name].variant,
                job.space,
                job.folder,
                files,
                _taps(job, name),
            )
            for name, role in roles.items()
        },
        processors=dict(job.model.processors),
        golden=_GOLDEN_NAME,
        files=files,
        provenance=describe_provenance(
            source,
            job.config,
            job.weights_sha256,
            calibration_sha256=job.data.calibration.sha256()
            if used and job.data.calibration
            else None,
            calibration_samples=used,
            jpeg_draft=job.jpeg_draft,
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


def _taps(job: Job, role: str) -> dict[str, str]:
    """Return the end of the fingerprints of a role's taps, by output: "patches@3"."""
    kind = job.model.kind
    if not isinstance(kind, EmbeddingKind):
        return {}
    return {
        name: f"{name.partition('@')[0]}@{tap.blocks}"
        for name, tap in kind.taps.items()
        if tap.role == role
    }


def _remove_unused(job: Job, kept: Mapping[str, list[BuiltVariant]]) -> None:
    """Remove the fp32 graphs unless fp32 was requested."""
    used = {
        path
        for variants in kept.values()
        for variant in variants
        for model in variant.models.values()
        for path in (model, *external_files(model))
    }
    used |= {variant.nodes for variants in kept.values() for variant in variants if variant.nodes}
    for name in kept:
        for path in (job.folder / name).iterdir():
            if path not in used:
                path.unlink()


def _calibration_samples(job: Job, roles: Mapping[str, BuiltRole]) -> int:
    """Return the number of calibration samples; 0 where no variant needed any."""
    if job.data.calibration is None:
        return 0
    made = [variant.recipe for role in roles.values() for variant in role.variants]
    needed = job.config.explain or any(recipe.needs_calibration for recipe in made)
    return len(job.data.calibration) if needed else 0
