"""Contestants of clip_cpu.py: mmedge's variants and the named peers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import Size, bundle, images, source
from int8_peers import write_dynamic, write_static
from transformers import CLIPModel

from mmedge.bundle import Bundle, open_bundle
from mmedge.converters.families import family_of
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import DynamicInt8, StaticInt8
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array

__all__ = ["Call", "contestants", "tensors", "token_ids"]

_END = 49407
Call = Callable[[Array], Array]
"""One encoder: a batch in, embeddings out."""


def tensors(size: Size, count: int, seed: int) -> list[Array]:
    """Return synthetic images, each preprocessed: (1, 3, 224, 224) float32."""
    opened = open_bundle(bundle(size))
    processor = open_processor(opened.manifest.processors["image"], opened.path)
    return [next(iter(processor([image]).values())) for image in images(count, seed)]


def token_ids(length: int, seed: int) -> Array:
    """Return one random text: (1, length) int64, of which the last is the end."""
    ids = np.random.default_rng(seed).integers(1, _END - 1, (1, length))
    ids[:, -1] = _END
    return ids


def _calibration(size: Size, role: str) -> list[Array]:
    if role == "image_encoder":
        return tensors(size, 64, seed=1)
    lengths = np.random.default_rng(9).integers(6, 40, 64)
    return [token_ids(int(length), seed=2000 + seed) for seed, length in enumerate(lengths)]


def contestants(size: Size, role: str, folder: Path, threads: int) -> dict[str, Call]:
    """Return the contestants of a role, by name; torch eager first."""
    opened = open_bundle(bundle(size))
    calls = _torch(size, role)
    for variant in opened.role(role).variants:
        calls[f"mmedge {variant.name}"] = _mmedge(opened.model_path(variant), threads)
    calls["mmedge int8-dynamic-paired"] = _mmedge(_paired(opened, role, folder), threads)
    portable = opened.file(opened.variant(role, "fp32").models["portable"])
    # What other tools are given is what torch exports: early selection is part of mmedge.
    plain = folder / role / "plain.onnx"
    exported = open_source(str(source(size)), None)
    family = family_of(exported)
    with quiet_libraries():
        described = family.describe(exported, family.load(exported))
        export_role(role, described.roles[role](), plain, plain=True)
    calls |= _onnxruntime(size, role, plain, folder, threads)
    # QDQ for OpenVINO and others, unsigned; from what the peers are calibrated on.
    ours = folder / f"{role}-qdq.onnx"
    feeds = [{_input_name(portable): feed} for feed in _calibration(size, role)]
    quantize(portable, ours, StaticInt8(form="qdq"), calibration=lambda: feeds)
    calls |= _openvino(size, role, plain, {"fp32": portable, "int8-static qdq": ours}, threads)
    return calls


def _paired(opened: Bundle, role: str, folder: Path) -> Path:
    """Return the variants of a bundle for a processor without VNNI."""
    out = folder / f"{role}-paired.onnx"
    fp32 = opened.file(opened.variant(role, "fp32").models["onnxruntime"])
    quantize(fp32, out, DynamicInt8(paired=True))
    return out


def _mmedge(model: Path, threads: int) -> Call:
    session = open_session(model, options=SessionOptions(threads=threads))
    name, output = session.inputs[0].name, session.outputs[0].name
    return lambda x: session.run({name: x})[output]


def _input_name(model: Path) -> str:
    with open_session(model) as session:
        return session.inputs[0].name


def _torch(size: Size, role: str) -> dict[str, Call]:
    model = CLIPModel.from_pretrained(source(size)).eval()

    def image(x: torch.Tensor) -> torch.Tensor:
        pooled = model.vision_model(pixel_values=x).pooler_output
        return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)

    def text(x: torch.Tensor) -> torch.Tensor:
        pooled = model.text_model(input_ids=x).pooler_output
        return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)

    eager = image if role == "image_encoder" else text
    # One graph a shape, as a user with fixed shapes would have it.
    compiled = torch.compile(eager, dynamic=False)

    def call(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        def run(x: Array) -> Array:
            with torch.inference_mode():
                return function(torch.from_numpy(x)).numpy()

        return run

    return {"torch eager": call(eager), "torch.compile": call(compiled)}


def _onnxruntime(
    size: Size, role: str, exported: Path, folder: Path, threads: int
) -> dict[str, Call]:
    from onnxruntime import InferenceSession
    from onnxruntime import SessionOptions as EngineOptions

    options = EngineOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3

    def call(model: Path) -> Call:
        session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    plain = call(exported)
    name = InferenceSession(exported, options).get_inputs()[0].name
    dynamic, static = folder / f"{role}-dynamic.onnx", folder / f"{role}-static.onnx"
    write_dynamic(exported, dynamic)
    write_static(exported, static, ({name: feed} for feed in _calibration(size, role)))
    return {
        "onnxruntime fp32": plain,
        "onnxruntime quantize_dynamic": call(dynamic),
        "onnxruntime quantize_static u8": call(static),
    }


def _openvino(
    size: Size, role: str, plain: Path, ours: dict[str, Path], threads: int
) -> dict[str, Call]:
    import nncf
    import openvino

    core = openvino.Core()
    model = core.read_model(plain)
    quantized = nncf.quantize(
        core.read_model(plain),
        nncf.Dataset(_calibration(size, role), lambda x: {0: x}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=64,
    )

    def call(network: Any) -> Call:  # noqa: ANN401
        compiled = core.compile_model(
            network,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # else it takes bf16 where the CPU has it
            },
        )
        request = compiled.create_infer_request()

        def run(x: Array) -> Array:
            request.infer({0: x}, share_inputs=True)
            return np.array(request.get_output_tensor(0).data)

        return run

    return {
        "openvino fp32": call(model),
        "openvino nncf int8": call(quantized),
        **{
            f"mmedge {name} in openvino": call(core.read_model(path)) for name, path in ours.items()
        },
    }
