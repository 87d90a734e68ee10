"""fuse_head(): encoders and a head as one graph."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import compose

from mmedge.bundle import Bundle, open_bundle
from mmedge.bundle.kinds import EmbeddingKind, FusedKind, ModuleKind
from mmedge.bundle.kinds.embedding import EMBEDDING
from mmedge.bundle.tensors import CallerFeed, Feed, InputEntry, ProcessorFeed
from mmedge.converters.config import ConvertConfig
from mmedge.converters.described import Described
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.onnx_graph import draw_inputs, usual_axes
from mmedge.converters.heads.base import head_sample
from mmedge.converters.pipeline import convert_model
from mmedge.converters.progress import Progress, ignore_progress
from mmedge.converters.report import ConversionReport
from mmedge.converters.request import read_data
from mmedge.converters.sources.source import Source
from mmedge.errors import ConversionError, SpaceMismatchError
from mmedge.files import sha256_file
from mmedge.specs import Axis, Precision, TensorSpec

__all__ = ["fuse_head"]


@dataclass(frozen=True)
class _Part:
    """An encoder whose taps the head reads.

    Attributes:
        bundle: Its bundle.
        role: Its role.
        wires: Its output by input of the head.
    """

    bundle: Bundle
    role: str
    wires: Mapping[str, str]


def fuse_head(
    head: Path | str,
    on: Path | str | Sequence[Path | str],
    config: ConvertConfig,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a head and its encoders to one graph, a bundle of kind `module`.

    In fp32 on CPU its outputs equal those of the separate graphs, bit for bit. Raw inputs are
    given by the name of a processor ("image", "text"), sensors by input.

    Args:
        head: The head's bundle.
        on: Bundles of the encoders that it reads.
        config: Settings; `source` is a name for the provenance.
        progress: Progress callback.

    Raises:
        ConversionError: If a bundle has no fp32 graph, or two encoders have an input of one name.
        SpaceMismatchError: If a tap is of another encoder.
        BackendError, BundleError, StorageError: As for `convert`.
    """
    bundle = open_bundle(head)
    kind = bundle.manifest.kind
    if not isinstance(kind, FusedKind):
        raise ConversionError(f"{bundle.path} is a {kind.type} bundle, no head. Convert it first.")
    places = [on] if isinstance(on, str | Path) else list(on)
    parts = list(_parts(bundle, kind, [open_bundle(place) for place in places]))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "fused.onnx"
        renamed = _write(bundle, kind, parts, graph)
        model = _describe(bundle, kind, parts, graph, renamed)
        source = Source(Path(), config.source, None, {"model_type": "module"}, (), {})
        weights = sha256_file(graph.with_name(f"{graph.name}.data"))
        described = Described(source, "module", model, weights)
        report = progress or ignore_progress
        return convert_model(config, read_data(config), lambda: described, report)


def _parts(head: Bundle, kind: FusedKind, bundles: Sequence[Bundle]) -> Iterator[_Part]:
    """Yield the encoders that the head reads.

    Raises:
        SpaceMismatchError: If an input finds none.
    """
    wanted = {name: each for name, each in kind.head.inputs.items() if each.tap is not None}
    found: set[str] = set()
    for bundle in bundles:
        section = bundle.manifest.kind
        if not isinstance(section, EmbeddingKind):
            continue
        for modality, role in section.encoders.items():
            variant = bundle.variant(role, Precision.FP32.value)
            first = bundle.role(role).outputs[0].name
            spaces = {variant.space: (first, None)} | {
                variant.taps[name]: (name, tap.mask)
                for name, tap in section.taps.items()
                if tap.role == role
            }
            wires: dict[str, str] = {}
            for name, each in wanted.items():
                if each.modality is not modality or each.space not in spaces or name in found:
                    continue
                wires[name], mask = spaces[each.space]
                if each.mask is not None and mask is not None:
                    wires[each.mask] = mask
                found.add(name)
            if wires:
                yield _Part(bundle, role, wires)
    if missing := sorted(wanted.keys() - found):
        each = wanted[missing[0]]
        raise SpaceMismatchError(
            f"{head.path}: input '{missing[0]}' reads '{each.tap or EMBEDDING}' of {each.space}, "
            f"which is not in {[str(one.path) for one in bundles]} in fp32. Pass the encoder that "
            "the head was trained on."
        )


def _write(head: Bundle, kind: FusedKind, parts: Sequence[_Part], out: Path) -> dict[str, str]:
    """Write the joined graph; return the encoders' names of the head's axes."""
    joined = _graph(head, kind.role, "head/")
    axes: dict[str, str] = {}
    entries = {entry.name: entry for entry in head.role(kind.role).inputs}
    for part in parts:
        prefix = f"{part.role}/"
        graph = _graph(part.bundle, part.role, prefix)
        taps = {entry.name: entry for entry in part.bundle.role(part.role).outputs}
        wires = {f"head/{ours}": f"{prefix}{theirs}" for ours, theirs in part.wires.items()}
        for ours, theirs in part.wires.items():
            for mine, other in zip(entries[ours].shape, taps[theirs].shape, strict=True):
                if isinstance(mine, str):
                    axes[mine] = str(other)
        for node in joined.graph.node:
            node.input[:] = [wires.get(name, name) for name in node.input]
        kept = [value for value in joined.graph.input if value.name not in wires]
        del joined.graph.input[:]
        joined.graph.input.extend([*graph.graph.input, *kept])
        nodes = [*graph.graph.node, *joined.graph.node]
        del joined.graph.node[:]
        joined.graph.node.extend(nodes)
        joined.graph.initializer.extend(graph.graph.initializer)
        joined.graph.value_info.extend([*graph.graph.value_info, *graph.graph.output])
    values = (*joined.graph.input, *joined.graph.output)
    _rename(joined, {value.name: value.name.split("/", 1)[1] for value in values})
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in axes:
                dim.dim_param = axes[dim.dim_param]
    onnx.save(
        joined, out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=1024
    )
    return axes


def _graph(bundle: Bundle, role: str, prefix: str) -> onnx.ModelProto:
    """Return the portable fp32 graph of a role, every name with a prefix."""
    variant = bundle.variant(role, Precision.FP32.value)
    model = onnx.load(bundle.model_path(variant, layouts=("portable",)))
    return compose.add_prefix(model, prefix)


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)


def _describe(
    head: Bundle, kind: FusedKind, parts: Sequence[_Part], graph: Path, renamed: Mapping[str, str]
) -> ModelSpec:
    """Describe the joined graph: images and texts come from processors, sensors from the caller."""
    role = head.role(kind.role)
    wired = {name for part in parts for name in part.wires}
    entries: list[tuple[InputEntry, Feed]] = []
    axes: dict[str, Axis] = {}
    for part in parts:
        held = part.bundle.role(part.role)
        entries += [(entry, entry.feed) for entry in held.inputs]
        for name, bounds in held.axes.items():
            axes[name] = _narrower(axes.get(name), bounds.axis())
    entries += [(entry, CallerFeed()) for entry in role.inputs if entry.name not in wired]
    names = [entry.name for entry, _ in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConversionError(
            f"Two encoders have an input '{twice[0]}', which one graph cannot. Run the head on "
            "separate sessions: mmedge.load_head."
        )
    inputs = tuple(_renamed(entry.spec(), renamed) for entry, _ in entries)
    outputs = tuple(_renamed(entry.spec(), renamed) for entry in role.outputs)
    for name, bounds in role.axes.items():
        if name not in renamed:
            axes[name] = bounds.axis()
    axes = {**usual_axes(inputs), **axes}
    manifests = {
        feed.processor: part.bundle
        for part in parts
        for entry in part.bundle.role(part.role).inputs
        if isinstance(feed := entry.feed, ProcessorFeed)
    }
    processors = {name: one.manifest.processors[name] for name, one in manifests.items()}
    spec = RoleSpec(
        module=None,
        graph=graph,
        inputs=inputs,
        outputs=outputs,
        axes=axes,
        sample=head_sample(lambda sizes, seed: draw_inputs(inputs, sizes, seed), kind.head, wired),
        trace_sizes={name: max(2, axis.min) for name, axis in axes.items()},
        proof_sizes=({name: max(1, axis.min) for name, axis in axes.items()},),
        feeds={entry.name: feed for entry, feed in entries},
        compare={entry.name: entry.compare for entry in role.outputs},
    )
    files = {
        path: manifests[name].file(path).read_bytes()
        for name, config in processors.items()
        for path in config.files
    }
    module = ModuleKind()
    return ModelSpec(
        module, (), {module.role: lambda: spec}, processors, files, reference_processors=False
    )


def _narrower(left: Axis | None, right: Axis) -> Axis:
    if left is None:
        return right
    low, high = max(left.min, right.min), min(left.max, right.max)
    return Axis(low, min(max(left.opt, low), high), high)


def _renamed(spec: TensorSpec, names: Mapping[str, str]) -> TensorSpec:
    shape = (names.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return TensorSpec(spec.name, spec.dtype, tuple(shape))
