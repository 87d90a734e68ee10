"""Export of ONNX files, engines and io.json for trtexec and C++ nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mmedge.bundle.creating import describe_files
from mmedge.bundle.golden import Golden
from mmedge.bundle.kinds import DualEncoderKind, EncoderKind
from mmedge.bundle.opening import Bundle
from mmedge.bundle.tensors import TensorEntry
from mmedge.errors import BundleError
from mmedge.exports.document import (
    IO_NAME,
    TOKENIZER_NAME,
    EngineFile,
    Graph,
    IoDocument,
    ShapeBounds,
    TextSteps,
)
from mmedge.exports.place import ExportFolder, fresh_folder
from mmedge.exports.selection import Selection
from mmedge.exports.steps import describe_images, describe_texts
from mmedge.exports.trtexec import trtexec_lines
from mmedge.exports.vectors import write_graph_vectors
from mmedge.preprocess.config import (
    AudioConfig,
    ImageConfig,
    ProcessorConfig,
    TextConfig,
    VectorConfig,
    VideoConfig,
)
from mmedge.runtimes.engines.spec import EngineKey
from mmedge.sessions.axes import dynamic_axes
from mmedge.specs import Axis, dim_size

__all__ = ["EngineSource", "SuppliedEngine", "axis_bounds", "export_engine_folder"]


@dataclass(frozen=True, slots=True)
class SuppliedEngine:
    """An engine to export.

    Attributes:
        plan: The serialized engine.
        key: What it was built from and for.
    """

    plan: bytes
    key: EngineKey


EngineSource = Callable[[Selection], Iterable[SuppliedEngine]]
"""Returns the engines of a graph, possibly none."""


def export_engine_folder(
    bundle: Bundle,
    out: Path,
    selections: Sequence[Selection],
    *,
    engines: EngineSource = lambda _: (),
    overwrite: bool = False,
) -> IoDocument:
    """Write graphs, engines, tokenizer, vectors and `io.json` to a folder, atomically.

    Args:
        bundle: An opened bundle.
        out: The folder.
        selections: What is exported, all in the portable layout: see select.
        engines: Where engines come from.
        overwrite: Whether an older export may be replaced.

    Returns:
        The content of `io.json`.

    Raises:
        IntegrityError: If a file of the bundle is missing or changed.
        BundleError: If a dynamic axis of a graph is bounded by nothing.
        StorageError: If the folder cannot be written, or something else is there.
    """
    golden = bundle.golden()
    manifest = bundle.manifest
    kind = manifest.kind
    with fresh_folder(bundle, out, IO_NAME, overwrite=overwrite) as folder:
        graphs = tuple(_graph(bundle, golden, each, folder, engines) for each in selections)
        configs = _configs(bundle, selections)
        document = IoDocument(
            name=manifest.name,
            family=manifest.family,
            made_by=f"mmedge {version('mmedge')}",
            graphs=graphs,
            image=next(
                (describe_images(c, folder) for c in configs if isinstance(c, ImageConfig)), None
            ),
            text=next(
                (_text(bundle, c, folder) for c in configs if isinstance(c, TextConfig)), None
            ),
            audio=next((c for c in configs if isinstance(c, AudioConfig)), None),
            vectors=tuple(c for c in configs if isinstance(c, VectorConfig)),
            video=next((c for c in configs if isinstance(c, VideoConfig)), None),
            scores=kind.contrastive_head if isinstance(kind, DualEncoderKind) else None,
            classes=kind.class_head if isinstance(kind, EncoderKind) else None,
            files=describe_files(folder.path),
        )
        text = json.dumps(document.model_dump(mode="json"), indent=2, ensure_ascii=False)
        folder.write(IO_NAME, f"{text}\n".encode())
    return document


def axis_bounds(bundle: Bundle, role: str) -> dict[str, Axis]:
    """Return the bounds of all dynamic axes of a role's inputs.

    Raises:
        BundleError: If nothing bounds one of them.
    """
    bounds = dynamic_axes(bundle.manifest, role)
    largest = {name: axis.max for name, axis in bounds.items()}
    for entry in bundle.role(role).inputs:
        for axis in entry.shape:
            if dim_size(axis, largest) is None:
                raise BundleError(
                    f"{bundle.path}: the manifest has no bounds for axis '{axis}' of input "
                    f"'{entry.name}' of role '{role}', so no engine can be built for it. Leave the "
                    "role out with --role."
                )
    return bounds


def _graph(
    bundle: Bundle,
    golden: Golden,
    selection: Selection,
    folder: ExportFolder,
    engines: EngineSource,
) -> Graph:
    name, variant = selection.role, selection.variant
    role = bundle.role(name)
    # Fixed names: names from a bundle are untrusted.
    stem = f"{name}/{variant.name}"
    model = f"{stem}.onnx"
    external = folder.copy_model(variant, variant.models[selection.layout], model)
    axes = axis_bounds(bundle, name)
    vectors = write_graph_vectors(folder, golden, name, role, variant, axes)
    return Graph(
        role=name,
        variant=variant.name,
        precision=variant.precision,
        modality=bundle.manifest.modality(name),
        onnx=model,
        external_data=external,
        opset=variant.opset,
        inputs=_entries(role.inputs),
        outputs=_entries(role.outputs),
        axes=axes,
        engines=tuple(_engine(each, stem, folder) for each in engines(selection)),
        trtexec=trtexec_lines(model, f"{stem}.engine", role.inputs, axes, vectors),
        vectors=vectors,
    )


def _entries(entries: Sequence[TensorEntry]) -> tuple[TensorEntry, ...]:
    """Return the entries without bundle-only fields."""
    return tuple(TensorEntry(name=e.name, dtype=e.dtype, shape=e.shape) for e in entries)


def _engine(engine: SuppliedEngine, stem: str, folder: ExportFolder) -> EngineFile:
    key = engine.key
    gpu = key.compute_capability.replace("+", "_").replace(".", "")
    relative = f"{stem}.{key.request.backend}-{key.version}.sm{gpu}.engine"
    folder.write(relative, engine.plan)
    return EngineFile(
        file=relative,
        backend=key.request.backend,
        version=key.version,
        compute_capability=key.compute_capability,
        cuda=key.cuda,
        driver=key.driver,
        profiles=tuple(
            {
                name: ShapeBounds(min=shapes.min, opt=shapes.opt, max=shapes.max)
                for name, shapes in profile.ranges.items()
            }
            for profile in key.request.profiles
        ),
    )


def _configs(bundle: Bundle, selections: Sequence[Selection]) -> tuple[ProcessorConfig, ...]:
    """Return the processors that feed the exported roles."""
    names = (bundle.manifest.processor_of(each.role) for each in selections)
    return tuple(bundle.manifest.processors[name] for name in names if name is not None)


def _text(bundle: Bundle, config: TextConfig, folder: ExportFolder) -> TextSteps:
    steps = describe_texts(
        config.model_copy(update={"tokenizer_file": TOKENIZER_NAME}),
        bundle.file(config.tokenizer_file),
    )
    folder.copy(config.tokenizer_file, TOKENIZER_NAME)
    return steps
