"""Full-size CLIP on this CPU: mmedge beside the named peers, in one interleaved run.

Peers: torch eager and torch.compile with transformers; ONNX Runtime on the plain fp32 export; ONNX
Runtime's own quantize_dynamic and quantize_static; OpenVINO fp32 and NNCF int8. Every contestant
gets the same tensors, one after the other in random order, round after round; a ratio is the median
over the rounds of (mmedge / peer) within the round, with a bootstrap interval of 95 %. Cosines are
against torch eager on held-out pictures (or ids) that no calibration saw; the weights are random,
so they compare the methods' arithmetic and say nothing of a trained model's accuracy.

Two floors stand beside them, neither of which could be a model:

- computed: the operations that one picture or text needs (those of the pooled token only, after the
  last block's keys and values; attention's products are counted), divided by the rate of a large
  int8 product that stays in the caches, measured in the same run in ONNX Runtime and in OpenVINO,
  the faster of both. "times the floor" is a contestant's shortest time over it, whatever its
  precision. See int8_floor.py.
- measured: the products alone, each of the encoder's int8 products in its own size and with weights
  of its own, and nothing else (not attention's products), a contestant of the race in ONNX Runtime
  and in OpenVINO. "times the products alone" is a contestant's time over that of the faster engine
  within the round, median over the rounds. See products_alone.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import SIZES, Size, bundle, pictures, source
from int8_floor import int8_rate, operations
from products_alone import Product, alone_in_onnxruntime, alone_in_openvino, products
from racing import race, ratio
from record import argument_parser, int8_instructions, record
from transformers import CLIPConfig, CLIPModel

from mmedge.bundle import Bundle, open_bundle
from mmedge.converters.export import export_role
from mmedge.converters.families import family_of
from mmedge.converters.methods import DynamicInt8, StaticInt8
from mmedge.converters.quantize import quantize
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.source import open_source
from mmedge.preprocess import ImageProcessor
from mmedge.runtimes.session import SessionOptions, open_session
from mmedge.specs import Array

_TEXT_LENGTHS = (8, 12, 16, 32, 77)
_END = 49407
Call = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Floors:
    """What nobody can be faster than, in one race.

    Attributes:
        computed_s: Operations over the rate of a large product, in seconds.
        alone: Runs the int8 products alone, by engine.
    """

    computed_s: float
    alone: dict[str, Callable[[], object]]


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=SIZES, default="b32")
    parser.add_argument("--only", choices=["image", "text"], help="one encoder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size: Size = arguments.model
    if arguments.output.name == "clip_cpu.json":  # not named by the caller
        kind = "" if int8_instructions() else "_without_vnni"
        model = "" if size == "b32" else f"_{size}"
        arguments.output = arguments.output.with_name(f"clip_cpu{kind}{model}.json")
    rates = int8_rate()
    rate = max(rates.values())
    results: dict[str, Any] = {
        "model": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "int8_rate_gops": {name: round(found / 1e9, 1) for name, found in rates.items()},
    }
    config = CLIPConfig.from_pretrained(source(size))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "text":
            contestants = _contestants(size, "image_encoder", Path(folder), arguments.threads)
            frames = _tensors(size, 33, seed=2)
            for batch in (1, 8):
                feed = np.concatenate(frames[:batch])
                rounds = arguments.rounds if batch == 1 else max(10, arguments.rounds // 6)
                floors = Floors(
                    batch * operations(config.vision_config, "image") / rate,
                    _alone(products(config.vision_config, "image", batch), arguments.threads),
                )
                results[f"image_batch_{batch}"] = _race(
                    contestants, feed, frames[1:], rounds, floors
                )
        if arguments.only != "image":
            contestants = _contestants(size, "text_encoder", Path(folder), arguments.threads)
            for length in _TEXT_LENGTHS:
                ids = [_ids(length, seed=1000 + seed) for seed in range(33)]
                floors = Floors(
                    operations(config.text_config, "text", length) / rate,
                    _alone(products(config.text_config, "text", 1, length), arguments.threads),
                )
                results[f"text_{length}_tokens"] = _race(
                    contestants, ids[0], ids[1:], arguments.rounds, floors
                )
    record(arguments.output, results)


def _alone(wanted: list[Product], threads: int) -> dict[str, Callable[[], object]]:
    return {
        "onnxruntime": alone_in_onnxruntime(wanted, threads),
        "openvino": alone_in_openvino(wanted, threads),
    }


def _tensors(size: Size, count: int, seed: int) -> list[Array]:
    config = open_bundle(bundle(size)).manifest.preprocessing.image
    if config is None:
        raise ValueError("the bundle takes no pictures")
    processor = ImageProcessor(config)
    return [processor([picture]) for picture in pictures(count, seed)]


def _ids(length: int, seed: int) -> Array:
    ids = np.random.default_rng(seed).integers(1, _END - 1, (1, length))
    ids[:, -1] = _END
    return ids


def _calibration(size: Size, role: str) -> list[Array]:
    if role == "image_encoder":
        return _tensors(size, 64, seed=1)
    lengths = np.random.default_rng(9).integers(6, 40, 64)
    return [_ids(int(length), seed=2000 + seed) for seed, length in enumerate(lengths)]


def _contestants(size: Size, role: str, folder: Path, threads: int) -> dict[str, Call]:
    """Return every way to run a role, by name; torch eager first."""
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
        export_role(role, family.roles(family.load(exported))[role], plain, plain=True)
    calls |= _onnxruntime(size, role, plain, folder, threads)
    # QDQ for OpenVINO and others, unsigned; from what the peers are calibrated on.
    ours = folder / f"{role}-qdq.onnx"
    feeds = [{_input_name(portable): feed} for feed in _calibration(size, role)]
    quantize(portable, ours, StaticInt8(form="qdq"), calibration=lambda: feeds)
    calls |= _openvino(size, role, plain, {"fp32": portable, "int8-static qdq": ours}, threads)
    return calls


def _paired(opened: Bundle, role: str, folder: Path) -> Path:
    """Return what a bundle made for a processor without VNNI holds."""
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
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    options = EngineOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Calibration feeds, one at a time."""

        def __init__(self, feeds: Iterable[Array], name: str) -> None:
            self._feeds = ({name: feed} for feed in feeds)

        def get_next(self) -> dict[str, Array] | None:
            """Return the next feed."""
            return next(self._feeds, None)

    def call(model: Path) -> Call:
        session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    plain = call(exported)
    name = InferenceSession(exported, options).get_inputs()[0].name
    dynamic, static = folder / f"{role}-dynamic.onnx", folder / f"{role}-static.onnx"
    # Per channel and signed weights: the best that its own options give on this CPU.
    quantize_dynamic(
        exported,
        dynamic,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # ConvInteger is slower than Conv
    )
    quantize_static(
        exported,
        static,
        Reader(_calibration(size, role), name),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
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


def _race(
    contestants: dict[str, Call],
    feed: Array,
    held_out: list[Array],
    rounds: int,
    floors: Floors,
) -> dict[str, Any]:
    """Let all run in turns and compare them within each round."""
    reference = np.concatenate([contestants["torch eager"](x) for x in held_out])
    cosines = {}
    for name, call in contestants.items():
        answers = np.concatenate([call(x) for x in held_out])
        cosines[name] = (answers * reference).sum(axis=1)
    turns: dict[str, Callable[[], object]] = {
        name: partial(call, feed) for name, call in contestants.items()
    }
    turns |= {_alone_in(engine): call for engine, call in floors.alone.items()}
    wall, cpu = race(turns, rounds)
    fastest = min(map(_alone_in, floors.alone), key=lambda name: np.median(wall[name]))
    figures: dict[str, Any] = {}
    print(
        f"\n{'':36}{'wall p50':>10}{'cpu p50':>10}{'cos mean':>11}{'cos min':>11}"
        f"{'x floor':>9}{'x alone':>9}   ms, n={rounds}"
    )
    for name in turns:
        figures[name] = {
            "wall_p50_ms": round(float(np.median(wall[name])) * 1e3, 3),
            "wall_min_ms": round(float(wall[name].min()) * 1e3, 3),
            "cpu_p50_ms": round(float(np.median(cpu[name])) * 1e3, 3),
            "times_the_floor": round(float(wall[name].min()) / floors.computed_s, 3),
            "times_the_products_alone": {
                "wall": ratio(wall[name] / wall[fastest]),
                "cpu": ratio(cpu[name] / cpu[fastest]),
            },
        }
        line, cosine = figures[name], cosines.get(name)
        shown = ""
        if cosine is not None:
            line["cosine_mean"] = round(float(cosine.mean()), 6)
            line["cosine_min"] = round(float(cosine.min()), 6)
            shown = f"{line['cosine_mean']:11.6f}{line['cosine_min']:11.6f}"
        print(
            f"{name:36}{line['wall_p50_ms']:10.2f}{line['cpu_p50_ms']:10.2f}{shown:22}"
            f"{line['times_the_floor']:9.2f}"
            f"{line['times_the_products_alone']['wall']['median']:9.2f}"
        )
    ratios: dict[str, Any] = {}
    for ours in (name for name in contestants if name.startswith("mmedge")):
        for peer in (name for name in contestants if not name.startswith("mmedge")):
            ratios[f"{ours} / {peer}"] = {
                kind: ratio(times[ours] / times[peer])
                for kind, times in (("wall", wall), ("cpu", cpu))
            }
    return {
        "floor_ms": round(floors.computed_s * 1e3, 3),
        "products_alone": {name: figures.pop(name) for name in map(_alone_in, floors.alone)},
        "contestants": figures,
        "ratios": ratios,
    }


def _alone_in(engine: str) -> str:
    return f"products alone in {engine}"


if __name__ == "__main__":
    main()
