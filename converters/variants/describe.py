"""Manifest roles from built variants: quality, spaces, files, order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.bundle.manifest import FileEntry, Role, Variant
from mmedge.bundle.quality import Quality
from mmedge.bundle.tensors import AxisEntry, InputEntry, OutputEntry, StateEntry
from mmedge.bundle.tuning import SearchRecord
from mmedge.converters.evaluation.base import Collected, Evaluation
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.variants.builder import TOLERANCES, BuiltVariant
from mmedge.specs import Array, Compare, Precision

__all__ = ["BuiltRole", "describe_role", "external_files", "files_of", "judge"]

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
    """A role with all its built variants, fp32 first.

    Attributes:
        spec: What it was made from.
        golden: Inputs of the golden vectors.
        variants: fp32, then the others.
        default: Name of the variant that a search chose, None where there was none.
        search: What it tried.
        qualities: Quality by variant name.
    """

    spec: RoleSpec
    golden: Mapping[str, Array]
    variants: tuple[BuiltVariant, ...]
    default: str | None = None
    search: SearchRecord | None = None
    qualities: Mapping[str, Quality | None] = field(default_factory=dict)

    @property
    def reference(self) -> Collected:
        """fp32's outputs for the evaluation samples."""
        return self.variants[0].collected


def judge(
    name: str, variant: BuiltVariant, roles: Mapping[str, BuiltRole], evaluation: Evaluation
) -> Quality | None:
    """Compare a variant with fp32; the other roles' outputs are fp32's.

    Returns:
        None for fp32 where there is no task to measure.
    """
    reference = {other: role.reference for other, role in roles.items()}
    quality = evaluation.quality(name, roles[name].spec, reference, variant.collected)
    if variant.recipe.precision is Precision.FP32 and not quality.drops:
        return None
    return quality


def describe_role(
    role: BuiltRole,
    evaluation: Evaluation,
    kept: Sequence[BuiltVariant],
    default: str,
    space: str,
    folder: Path,
    files: Mapping[str, FileEntry],
    taps: Mapping[str, str],
) -> Role:
    """Describe a role for the manifest, highest fidelity first.

    Args:
        role: The role, with the qualities of its variants.
        evaluation: Evaluation of the variants.
        kept: The variants that go into the bundle.
        default: Name of the default variant.
        space: Embedding-space fingerprint of fp32.
        folder: The bundle.
        files: Its files.
        taps: What the fingerprint of a tap ends with, by output.
    """
    spec = role.spec
    embeds = Compare.ROWS in spec.compare.values()

    def describe(variant: BuiltVariant) -> Variant:
        quality = role.qualities[variant.recipe.variant]
        alike = quality is None or evaluation.interchangeable(quality)
        own = space if alike else f"{space}+{variant.recipe.variant}"
        described = _describe(variant, quality, own if embeds else None, folder, files)
        return described.model_copy(
            update={"taps": {name: f"{own}/{tap}" for name, tap in taps.items()}}
        )

    def fidelity(variant: BuiltVariant) -> tuple[int, float]:
        quality = role.qualities[variant.recipe.variant]
        cosine = 1.0 if quality is None else quality.value("cosine_mean") or 0.0
        return _FIDELITY.index(variant.recipe.precision), -cosine

    return Role(
        inputs=tuple(InputEntry.of(item, spec.feeds[item.name]) for item in spec.inputs),
        outputs=tuple(OutputEntry.of(item, spec.compared(item.name)) for item in spec.outputs),
        axes={name: AxisEntry.of(axis) for name, axis in spec.axes.items()},
        state=None if spec.state is None else StateEntry.of(spec.state),
        variants=tuple(describe(variant) for variant in sorted(kept, key=fidelity)),
        default=default,
        search=role.search,
    )


def _describe(
    variant: BuiltVariant,
    quality: Quality | None,
    space: str | None,
    folder: Path,
    files: Mapping[str, FileEntry],
) -> Variant:
    recipe = variant.recipe
    paths = sorted(
        {path for model in variant.models.values() for path in (model, *external_files(model))}
    )
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
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
        space=space,
        parity=variant.parity,
        quality=quality,
        tolerance=TOLERANCES[recipe.precision],
    )


def external_files(model: Path) -> tuple[Path, ...]:
    """Return the external weight files of a graph."""
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
    """Return all files of a variant."""
    return {path for model in built.models.values() for path in (model, *external_files(model))}
