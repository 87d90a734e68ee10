"""Model repository for Triton Inference Server.

One model runs each role's graph. For images and texts there are two more: `ROLE_preprocessing`,
which runs in Triton's Python backend with mmedge itself, and an ensemble of the two, `encode_image`
or `encode_text`, which takes the bytes of image files, raw frames or texts and gives embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Layout
from mmedge.bundle.opening import Bundle
from mmedge.errors import InputError
from mmedge.exports.document import TOKENIZER_NAME
from mmedge.exports.engine_folder import SuppliedEngine, axis_bounds
from mmedge.exports.pbtxt import Message, to_pbtxt
from mmedge.exports.place import ExportFolder, fresh_folder
from mmedge.exports.selection import Selection
from mmedge.exports.triton_configs import (
    FRAME,
    IMAGE,
    TEXT,
    Device,
    Platform,
    Warmup,
    encoder_config,
    ensemble_config,
    max_batch,
    preprocessing_config,
)
from mmedge.exports.triton_python import (
    PREPROCESSING_NAME,
    ImagePreprocessor,
    TextPreprocessor,
)
from mmedge.preprocess.config import ImageConfig, ProcessorConfig, TextConfig
from mmedge.runtimes.engines.spec import EngineKey
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.specs import Axis, Precision

__all__ = ["TRITON_BACKEND", "TRITON_MARKER", "TritonModel", "export_triton", "triton_layouts"]

TRITON_BACKEND = "tensorrt"
"""The backend whose engines Triton runs."""

TRITON_MARKER = "mmedge-export.json"

_VERSION = "1"
# Decoding and resizing an image takes longer on a CPU than encoding it on a GPU.
_INSTANCES = {"image": 2, "text": 1}
_BASIC, _EXTENDED = -1, 1  # Triton's numbers of ONNX Runtime's levels


@dataclass(frozen=True, slots=True)
class TritonModel:
    """One model of the repository.

    Attributes:
        name: Of the model and its folder.
        platform: What runs it: "onnxruntime_onnx", "tensorrt_plan", "python" or "ensemble".
        what: What it does, for people.
    """

    name: str
    platform: str
    what: str


def export_triton(
    bundle: Bundle,
    out: Path,
    selections: Sequence[Selection],
    *,
    engines: Mapping[str, SuppliedEngine] | None = None,
    device: Device = "auto",
    overwrite: bool = False,
) -> tuple[TritonModel, ...]:
    """Write a model repository, atomically.

    Args:
        bundle: An opened bundle.
        out: The folder that `tritonserver --model-repository` is given.
        selections: What is served, one variant a role: see select.
        engines: TensorRT engines by role; a role without one is served by ONNX Runtime.
        device: Where encoders run; "auto" leaves it to the server.
        overwrite: Whether an older export may be replaced.

    Returns:
        The models, in the order of the manifest.

    Raises:
        InputError: If a role is given twice, or an engine is not for Triton.
        IntegrityError: If a file of the bundle is missing or changed.
        BundleError: If a dynamic axis of a graph is bounded by nothing.
        StorageError: If the folder cannot be written, or something else is there.
    """
    engines = engines or {}
    _check(selections, engines)
    golden = bundle.golden()
    models: list[TritonModel] = []
    with fresh_folder(bundle, out, TRITON_MARKER, overwrite=overwrite) as folder:
        for selection in selections:
            encoder = _write_encoder(
                bundle, golden, selection, folder, engines.get(selection.role), device
            )
            models.append(
                TritonModel(
                    selection.role,
                    str(encoder["platform"]),
                    f"{selection.role}/{selection.variant.name}",
                )
            )
            models += _write_ensemble(bundle, selection, folder, encoder)
        _write_marker(bundle, selections, models, folder)
    return tuple(models)


def triton_layouts(device: Device) -> tuple[Layout, ...]:
    """Return the layouts that Triton's ONNX Runtime supports, best for the device first."""
    return ("onnxruntime", "portable") if device == "cpu" else ("portable", "onnxruntime")


def _check(selections: Sequence[Selection], engines: Mapping[str, SuppliedEngine]) -> None:
    roles = [selection.role for selection in selections]
    for role in roles:
        if roles.count(role) > 1:
            names = [each.variant.name for each in selections if each.role == role]
            raise InputError(
                f"Triton serves one variant of a role: got {names} for '{role}'. Name one with "
                "--precision."
            )
    for role, engine in engines.items():
        if engine.key.request.backend != TRITON_BACKEND:
            raise InputError(
                f"Role '{role}': Triton runs engines of TensorRT, got one of "
                f"{engine.key.request.backend}. Build one with TensorRT on the machine that serves,"
                " or omit the engine: ONNX Runtime runs the graph."
            )


def _write_encoder(
    bundle: Bundle,
    golden: Golden,
    selection: Selection,
    folder: ExportFolder,
    engine: SuppliedEngine | None,
    device: Device,
) -> Message:
    name, variant = selection.role, selection.variant
    role = bundle.role(name)
    level: int | None = None
    platform: Platform
    if engine is None:
        platform = "onnxruntime_onnx"
        model = variant.models[selection.layout]
        folder.copy_model(variant, model, f"{name}/{_VERSION}/model.onnx")
        axes = axis_bounds(bundle, name)
        level = _graph_level(bundle.file(model), variant.precision)
    else:
        platform, device = "tensorrt_plan", "cuda"
        folder.write(f"{name}/{_VERSION}/model.plan", engine.plan)
        axes = _engine_bounds(bundle, name, engine.key)
    warmup = _write_warmup(golden, name, folder, batched=max_batch(role, axes) > 0)
    config = encoder_config(
        name,
        role,
        axes,
        platform=platform,
        device=device,
        warmup=warmup,
        graph_level=level,
    )
    _write_config(folder, name, config)
    return config


def _graph_level(model: Path, precision: Precision) -> int | None:
    """Return ONNX Runtime's optimization level for a graph: lower with float16.

    It crashed on some such graphs at the full level, and gives wrong outputs where it fuses blocked
    quantized weights into a float16 product (runtimes/ort/session.py keeps from both).
    """
    if not read_onnx_file(model).has_fp16:
        return None
    return _EXTENDED if precision in (Precision.FP16, Precision.FP32) else _BASIC


def _engine_bounds(bundle: Bundle, role: str, key: EngineKey) -> dict[str, Axis]:
    """Return the bounds of the dynamic axes in the engine's first profile."""
    bounds = axis_bounds(bundle, role)
    for profile in key.request.profiles[:1]:
        for entry in bundle.role(role).inputs:
            shapes = profile.ranges[entry.name]
            for axis, *sizes in zip(entry.shape, shapes.min, shapes.opt, shapes.max, strict=True):
                if isinstance(axis, str):
                    bounds[axis] = Axis(*sizes)
    return bounds


def _write_warmup(golden: Golden, role: str, folder: ExportFolder, *, batched: bool) -> Warmup:
    shapes: dict[str, Sequence[int]] = {}
    files: dict[str, str] = {}
    for index, (name, array) in enumerate(golden.inputs[role].items()):
        sample = array[0] if batched else array
        little = np.ascontiguousarray(sample).astype(sample.dtype.newbyteorder("<"), copy=False)
        files[name], shapes[name] = f"input-{index}", sample.shape
        folder.write(f"{role}/warmup/{files[name]}", little.tobytes())
    return Warmup(shapes, files)


def _write_ensemble(
    bundle: Bundle, selection: Selection, folder: ExportFolder, encoder: Message
) -> list[TritonModel]:
    """Write the preprocessing model and the ensemble, if the bundle has processors."""
    role = bundle.role(selection.role)
    processor = bundle.manifest.processor_of(selection.role)
    config = None if processor is None else bundle.manifest.processors[processor]
    worker, inputs, what = _front(config)
    if config is None or not worker or any(e.name not in config.inputs for e in role.inputs):
        return []  # it has other inputs
    name = f"{selection.role}_preprocessing"
    batch = encoder["max_batch_size"]
    preprocessing = preprocessing_config(
        name,
        inputs,
        role.inputs,
        int(batch) if isinstance(batch, int) else 0,
        instances=_INSTANCES[config.type],
    )
    place = f"{name}/{_VERSION}"
    folder.write(f"{place}/model.py", _model_py(worker).encode())
    if isinstance(config, TextConfig):
        folder.copy(config.tokenizer_file, f"{place}/{TOKENIZER_NAME}")
        config = config.model_copy(update={"tokenizer_file": TOKENIZER_NAME})
    document = json.dumps(config.model_dump(mode="json"), indent=2)
    folder.write(f"{place}/{PREPROCESSING_NAME}", f"{document}\n".encode())
    _write_config(folder, name, preprocessing)
    ensemble = f"encode_{config.type}"
    _write_config(folder, ensemble, ensemble_config(ensemble, preprocessing, encoder))
    (folder.path / ensemble / _VERSION).mkdir()  # Triton requires the empty folder
    return [
        TritonModel(name, "python", f"preprocessing for {selection.role}"),
        TritonModel(ensemble, "ensemble", what),
    ]


def _front(config: ProcessorConfig | None) -> tuple[str, tuple[str, ...], str]:
    """Return a role's preprocessing: class, raw inputs, and description."""
    if isinstance(config, ImageConfig):
        what = f"'{IMAGE}' (bytes of image files) or '{FRAME}' (raw frames) to embeddings"
        return ImagePreprocessor.__name__, (IMAGE, FRAME), what
    if isinstance(config, TextConfig):
        return TextPreprocessor.__name__, (TEXT,), f"'{TEXT}' (UTF-8) to embeddings"
    return "", (), ""


def _model_py(worker: str) -> str:
    return (
        '"""Preprocessing in Triton\'s Python backend; the server\'s Python needs mmedge."""\n\n'
        f"from mmedge.exports.triton_python import {worker} as TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n'
    )


def _write_config(folder: ExportFolder, model: str, config: Message) -> None:
    folder.write(f"{model}/config.pbtxt", to_pbtxt(config).encode())


def _write_marker(
    bundle: Bundle,
    selections: Sequence[Selection],
    models: Sequence[TritonModel],
    folder: ExportFolder,
) -> None:
    document = {
        "made_by": f"mmedge {version('mmedge')}",
        "bundle": bundle.manifest.name,
        "variants": {each.role: each.variant.name for each in selections},
        "models": {each.name: each.platform for each in models},
    }
    folder.write(TRITON_MARKER, (json.dumps(document, indent=2) + "\n").encode())
