"""From built variants to the manifest's roles: quality, spaces, files, order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.bundle.manifest import FileEntry, Quality, Role, TensorEntry, Variant
from mmedge.bundle.search import SearchRecord
from mmedge.converters.evaluation.dataset import EvaluationSet
from mmedge.converters.evaluation.embedding import (
    Embeddings,
    TaskQuality,
    evaluate_variant,
    interchangeable,
    task_quality,
)
from mmedge.converters.variants.builder import TOLERANCES, BuiltVariant
from mmedge.specs import Array, Float32Array, Modality, Precision, TensorSpec

__all__ = ["BuiltRole", "describe_role", "external_files", "files_of", "judge", "judge_together"]

_FIDELITY = (
    Precision.FP32,
    Precision.FP16,
    Precision.BF16,
    Precision.INT8,
    Precision.FP8,
    Precision.INT4,
)


@dataclass(frozen=True)
class BuiltRole:
    """A role with every variant that was made of it, fp32 first.

    Attributes:
        modality: What it takes in.
        inputs: Its input specs.
        outputs: Its output specs.
        golden: One batch for the golden vectors.
        variants: fp32, then the others.
        default: Name of the variant that a search chose, None where there was none.
        search: What it tried.
        qualities: What it measured, by variant name.
    """

    modality: Modality
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden: Array
    variants: tuple[BuiltVariant, ...]
    default: str | None = None
    search: SearchRecord | None = None
    qualities: Mapping[str, Quality | None] = field(default_factory=dict)

    @property
    def reference(self) -> Float32Array:
        """The fp32 embeddings of the evaluation samples: (N, D)."""
        return self.variants[0].embeddings


def judge(
    role: BuiltRole, variant: BuiltVariant, roles: Mapping[str, BuiltRole], samples: EvaluationSet
) -> Quality | None:
    """Compare a variant with fp32; the other role's embeddings are fp32's.

    Returns:
        None for fp32 where there is no task to measure.
    """
    count = len(samples.texts)
    fp32 = {other.modality: other.reference for other in roles.values()}
    reference = _embeddings(fp32, count)
    candidate = _embeddings({**fp32, role.modality: variant.embeddings}, count)
    text = role.modality is Modality.TEXT
    quality = evaluate_variant(
        reference,
        candidate,
        role.modality,
        samples.known,
        data=samples.about_texts if text else samples.about_images,
    )
    if variant.recipe.precision is Precision.FP32 and not quality.drops:
        return None
    return quality


def _embeddings(by_modality: Mapping[Modality, Float32Array], texts: int) -> Embeddings:
    """Split what the text encoder gave into texts and the texts of classes."""
    of_texts = by_modality[Modality.TEXT]
    return Embeddings(by_modality[Modality.IMAGE], of_texts[:texts], of_texts[texts:])


def judge_together(
    chosen: Mapping[str, BuiltVariant], roles: Mapping[str, BuiltRole], samples: EvaluationSet
) -> TaskQuality:
    """Compare the tasks with every role in a variant of its own to those with all in fp32.

    Args:
        chosen: By role name.
        roles: The same roles.
        samples: What to measure on.
    """
    count = len(samples.texts)
    fp32 = {role.modality: role.reference for role in roles.values()}
    ours = {roles[name].modality: variant.embeddings for name, variant in chosen.items()}
    return task_quality(_embeddings(fp32, count), _embeddings(ours, count), samples.known)


def describe_role(
    role: BuiltRole,
    qualities: Mapping[str, Quality | None],
    kept: Sequence[BuiltVariant],
    space: str,
    folder: Path,
    files: Mapping[str, FileEntry],
) -> Role:
    """Describe a role for the manifest, highest fidelity first.

    Args:
        role: The role.
        qualities: By variant name.
        kept: The variants that go into the bundle.
        space: Embedding-space fingerprint of fp32.
        folder: The bundle.
        files: Its files.
    """

    def fidelity(variant: BuiltVariant) -> tuple[int, float]:
        quality = qualities[variant.recipe.variant]
        cosine = 1.0 if quality is None else quality.figures["cosine_mean"].value
        return _FIDELITY.index(variant.recipe.precision), -cosine

    return Role(
        modality=role.modality,
        inputs=tuple(TensorEntry.of(spec) for spec in role.inputs),
        outputs=tuple(TensorEntry.of(spec) for spec in role.outputs),
        variants=tuple(
            _describe(variant, qualities[variant.recipe.variant], space, folder, files)
            for variant in sorted(kept, key=fidelity)
        ),
        default=role.default,
        search=role.search,
    )


def _describe(
    variant: BuiltVariant,
    quality: Quality | None,
    space: str,
    folder: Path,
    files: Mapping[str, FileEntry],
) -> Variant:
    recipe = variant.recipe
    paths = sorted(
        {path for model in variant.models.values() for path in (model, *external_files(model))}
    )
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    alike = quality is None or interchangeable(quality)
    return Variant(
        name=recipe.variant,
        precision=recipe.precision,
        recipe=recipe.settings(),
        models={
            layout: model.relative_to(folder).as_posix() for layout, model in variant.models.items()
        },
        files=names,
        nodes=None if variant.nodes is None else variant.nodes.relative_to(folder).as_posix(),
        size_bytes=sum(files[name].size_bytes for name in names),
        opset=variant.opset,
        space=space if alike else f"{space}+{recipe.variant}",
        parity=variant.parity,
        quality=quality,
        tolerance=TOLERANCES[recipe.precision],
    )


def external_files(model: Path) -> tuple[Path, ...]:
    """Return the files that hold a graph's weights, beside the graph itself."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graph = onnx.load(model, load_external_data=False).graph
    locations = {
        ExternalDataInfo(tensor).location
        for tensor in graph.initializer
        if uses_external_data(tensor)
    }
    return tuple(model.parent / location for location in sorted(locations))


def files_of(built: BuiltVariant) -> set[Path]:
    """Return the files that a variant needs to run."""
    return {path for model in built.models.values() for path in (model, *external_files(model))}
