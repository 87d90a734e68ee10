"""Contestants of encoders_real_size.py: graphs made once, kept beside their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from full_size import CACHE, images
from int8_peers import write_dynamic, write_static
from real_size_names import ROLES
from real_size_sources import sounds, source

from mmedge.converters.families import family_of
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import DynamicInt8, StaticInt8
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.variants.builder import lay_out
from mmedge.errors import QuantizationError
from mmedge.preprocess.registry import open_processor
from mmedge.specs import Array

__all__ = ["Contestant", "held_out", "prepare"]

Feed = dict[str, Array]
_CALIBRATION = {"owlv2-base": 4}
_CALIBRATION_SAMPLES = 16
_HELD_OUT = 8


@dataclass(frozen=True)
class Contestant:
    """A graph and what runs it.

    Attributes:
        engine: "mmedge" and "mmedge-openvino" through mmedge's sessions, "onnxruntime" and
            "openvino" through the engine's own.
        model: Its file.
    """

    engine: str
    model: Path


def prepare(name: str) -> dict[str, Contestant]:
    """Return the contestants by name, ONNX Runtime in fp32 first; made on the first call.

    Args:
        name: A key of real_size_names.SUBJECTS.
    """
    folder = CACHE / f"real-size-{name}-graphs"
    folder.mkdir(parents=True, exist_ok=True)
    steps: dict[str, tuple[str, str, Callable[[Path], object]]] = {
        "onnxruntime fp32": ("onnxruntime", "plain.onnx", lambda out: _export(name, out)),
        "mmedge fp32": ("mmedge", "fp32.onnxruntime.onnx", lambda out: _fp32(name, out)),
        "mmedge int8-dynamic": ("mmedge", "dynamic.onnx", lambda out: _ours(name, out)),
        "mmedge int8-static": ("mmedge", "static.onnx", lambda out: _ours(name, out)),
        "mmedge int8-static in openvino": (
            "mmedge-openvino", "static.portable.onnx", lambda out: _ours(name, out)
        ),
        "onnxruntime quantize_dynamic": (
            "onnxruntime", "peer-dynamic.onnx", lambda out: _peer_dynamic(folder, out)
        ),
        "onnxruntime quantize_static": (
            "onnxruntime", "peer-static.onnx",
            lambda out: write_static(folder / "plain.onnx", out, _calibration(name)),
        ),
        "openvino fp32": ("openvino", "plain.onnx", lambda _: None),
        "openvino nncf int8": ("openvino", "nncf.xml", lambda out: _nncf(name, folder, out)),
    }  # fmt: skip
    made: dict[str, Contestant] = {}
    for label, (engine, file, make) in steps.items():
        out, absent = folder / file, folder / f"{file}.absent"
        if not out.is_file() and not absent.is_file():
            print(f"{name}: make {label}", flush=True)
            make(out)
            if not out.is_file():
                absent.touch()  # the method has nothing to do here
        if out.is_file():
            made[label] = Contestant(engine, out)
    return made


def held_out(name: str) -> list[Feed]:
    """Return synthetic samples that no calibration saw, each preprocessed, batch 1; kept.

    Args:
        name: A key of real_size_names.SUBJECTS.
    """
    file = CACHE / f"real-size-{name}-graphs" / "held-out.npz"
    if not file.is_file():
        samples = list(_inputs(name, _HELD_OUT, seed=2))
        rows: dict[str, Any] = {
            key: np.concatenate([x[key] for x in samples]) for key in samples[0]
        }
        np.savez(file, **rows)
    with np.load(file) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    return [{key: rows[i : i + 1] for key, rows in found.items()} for i in range(_HELD_OUT)]


def _inputs(name: str, count: int, seed: int) -> Iterator[Feed]:
    described, _ = _described(name)
    modality = "audio" if name in ROLES else "image"
    processor = open_processor(described.processors[modality], source(name))
    samples: Iterator[object] = sounds(count, seed) if name in ROLES else images(count, seed)
    for sample in samples:
        yield processor([sample])


def _role(name: str) -> str:
    return ROLES.get(name, "image_encoder")


def _described(name: str) -> tuple[ModelSpec, str]:
    opened = open_source(str(source(name)), None)
    family = family_of(opened)
    with quiet_libraries():
        return family.describe(opened, family.load(opened)), _role(name)


def _export(name: str, out: Path) -> None:
    """Write what torch exports, without mmedge's passes."""
    described, role = _described(name)
    with quiet_libraries():
        export_role(role, described.roles[role](), out, plain=True)


def _fp32(name: str, out: Path) -> None:
    described, role = _described(name)
    portable = out.with_name("fp32.onnx")
    with quiet_libraries():
        export_role(role, described.roles[role](), portable)
    lay_out(portable)


def _calibration(name: str) -> list[Feed]:
    return list(_inputs(name, _CALIBRATION.get(name, _CALIBRATION_SAMPLES), seed=1))


def _ours(name: str, out: Path) -> None:
    """Write all of mmedge's int8 graphs: the data is read once."""
    folder = out.parent
    feeds = _calibration(name)
    calibrator = Calibrator(lambda: feeds)
    portable, layout = folder / "fp32.onnx", folder / "fp32.onnxruntime.onnx"
    try:
        quantize(layout, folder / "dynamic.onnx", DynamicInt8())
    except QuantizationError:  # convolutions alone
        (folder / "dynamic.onnx.absent").touch()
    quantize(layout, folder / "static.onnx", StaticInt8(), calibration=calibrator)
    quantize(
        portable,
        folder / "static.portable.onnx",
        StaticInt8(form="qdq"),
        calibration=calibrator,
        share=folder / "static.onnx",
    )
    calibrator.close()


def _peer_dynamic(folder: Path, out: Path) -> None:
    import onnx

    graph = onnx.load(folder / "plain.onnx", load_external_data=False).graph
    if {"MatMul", "Gemm"} & {node.op_type for node in graph.node}:
        write_dynamic(folder / "plain.onnx", out)


def _nncf(name: str, folder: Path, out: Path) -> None:
    import nncf
    import openvino

    model: Any = openvino.Core().read_model(folder / "plain.onnx")
    transformer = any(op.get_type_name() == "Softmax" for op in model.get_ops())
    feeds: list[Mapping[str, Array]] = list(_calibration(name))
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)
