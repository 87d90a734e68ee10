"""CPU time, wall time and memory of a conversion beside a plain script; rate of the calibration.

Full-size CLIP with random weights to fp32 and int8, calibrated on 64 PNG images of 640x480.
`mmedge` is `mmedge convert --precision fp32,int8` with all its checks: it makes int8-dynamic and
int8-static of the image encoder and int8-dynamic of the text encoder, compares each with PyTorch,
evaluates it on images that it holds back, and times it. `plain` makes the same variants with
torch.onnx and onnxruntime.quantization, and checks nothing. `cpu_over_plain_static` is over its CPU
time less that of the dynamic image encoder.

Every run is a fresh process; the contestants take turns. CPU time is that of the process and its
children. Peak memory is the proportional set size (PSS) of both, read five times a second: pages of
a file that several map count once.

--pictures N measures the calibration's rate: N JPEG files of 640x480 through the ranges of the fp32
image encoder, in images a second over those of the same graph on tensors that are ready, batches of
8, interleaved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from full_size import SIZES, Size, bundle, calibration, images, source
from images_in import jpegs
from interleaved import ratio, time_interleaved
from record import argument_parser, record

from mmedge.bundle import open_bundle
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.feeds import Samples, role_feeds
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.request import convert
from mmedge.converters.statistics.collect import collect_ranges
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

CONTESTANTS = ("plain", "mmedge")
_DYNAMIC = "quantize_dynamic image"
_POLL_S = 0.2
_BATCH = 8


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="b32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant, such as mmedge")
    parser.add_argument("--pictures", type=int, default=400, help="0 skips the rate")
    arguments = parser.parse_args()
    weights = sum(path.stat().st_size for path in source(arguments.size).glob("*.safetensors"))
    calibration(captions=False)
    names = (arguments.only,) if arguments.only else CONTESTANTS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for _ in range(arguments.rounds):
        for name in rng.permutation(names):
            run = _run(str(name), arguments.size)
            runs[name].append(run)
            print(f"{name}: {json.dumps({k: v for k, v in run.items() if k != 'stages'})}")
    results: dict[str, Any] = {"size": arguments.size, "weights_bytes": weights, "images": 64}
    results["cpus"] = len(os.sched_getaffinity(0))
    for name, taken in runs.items():
        results[name] = _summary(taken, weights)
    if not arguments.only:
        ours, theirs = (
            np.array([one["cpu_s"] for one in runs[name]]) for name in CONTESTANTS[::-1]
        )
        spared = np.array([one["stages"][_DYNAMIC] for one in runs["plain"]])
        results["cpu_over_plain"] = ratio(ours / theirs)
        results["cpu_over_plain_static"] = ratio(ours / (theirs - spared))
        print(f"mmedge over plain, CPU: {results['cpu_over_plain']}, without the dynamic image ")
        print(f"encoder: {results['cpu_over_plain_static']}")
    if arguments.pictures:
        results["calibration"] = rate = _calibration_rate(arguments.pictures)
        print(f"calibration: {rate}")
    record(arguments.output, results)


def _summary(runs: list[dict[str, Any]], weights: int) -> dict[str, Any]:
    peak = max(run["peak_pss_bytes"] for run in runs)
    return {
        "n": len(runs),
        "cpu_s": round(float(np.median([run["cpu_s"] for run in runs])), 2),
        "wall_s": round(float(np.median([run["wall_s"] for run in runs])), 2),
        "peak_pss_mib": round(peak / 2**20),
        "peak_over_weights": round(peak / weights, 2),
        "stages_cpu_s": {
            stage: round(float(np.median([run["stages"].get(stage, 0.0) for run in runs])), 2)
            for stage in runs[-1]["stages"]
        },
    }


def _run(name: str, size: str) -> dict[str, Any]:
    """Run a contestant in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, size, folder]
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        peak = 0
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _tree_pss_bytes(process.pid))
            time.sleep(_POLL_S)
        wall_s = time.monotonic() - started
        output = process.stdout.read() if process.stdout else b""
    if status:
        raise RuntimeError(f"{name} failed: {os.waitstatus_to_exitcode(status)}")
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "wall_s": round(wall_s, 2),
        "peak_pss_bytes": peak,
        **json.loads(output),
    }


def _tree_pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process and its descendants."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except OSError:
        return 0  # it has ended
    pss = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(pss.split()[1]) * 1024 + sum(_tree_pss_bytes(int(child)) for child in children)


class _Stages:
    """CPU seconds of each stage: of this process and of those that it has waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._began = "start", 0.0

    def begin(self, stage: str) -> None:
        """End one stage and begin another."""
        if stage != self._stage:
            times = os.times()
            now = times.user + times.system + times.children_user + times.children_system
            spent = self.seconds.get(self._stage, 0.0) + now - self._began
            self.seconds[self._stage] = round(spent, 2)
            self._stage, self._began = stage, now


def _convert(size: Size, folder: Path, stages: _Stages) -> None:
    config = ConvertConfig(
        source=str(source(size)),
        out=folder / "clip.mmedge",
        precisions=("fp32", "int8"),
        calibration=calibration(captions=False),
    )
    convert(config, lambda event: stages.begin(event.stage))


def _plain(size: Size, folder: Path, stages: _Stages) -> None:
    """Export and quantize as the libraries' own documentation does."""
    import torch
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from PIL import Image
    from torch import nn
    from transformers import CLIPImageProcessorPil, CLIPModel

    stages.begin("load")
    folder_of_source = source(size)
    model = CLIPModel.from_pretrained(folder_of_source).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder_of_source)

    class ImageEncoder(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            pooled = model.vision_model(pixel_values).pooler_output
            return nn.functional.normalize(model.visual_projection(pooled), dim=-1)

    class TextEncoder(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            pooled = model.text_model(input_ids).pooler_output
            return nn.functional.normalize(model.text_projection(pooled), dim=-1)

    image_encoder, text_encoder = ImageEncoder(), TextEncoder()
    image_encoder.model, text_encoder.model = model, model
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=77)
    ids = torch.randint(1, 49000, (2, 16))
    ids[:, -1] = 49407
    side = model.config.vision_config.image_size
    stages.begin("export image")
    torch.onnx.export(
        image_encoder,
        (torch.randn(2, 3, side, side),),
        folder / "image.onnx",
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["image_embeds"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    stages.begin("export text")
    torch.onnx.export(
        text_encoder,
        (ids,),
        folder / "text.onnx",
        dynamo=True,
        input_names=["input_ids"],
        output_names=["text_embeds"],
        dynamic_shapes=({0: batch, 1: sequence},),
        verbose=False,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The calibration images, one at a time."""

        def __init__(self) -> None:
            self._files = iter(sorted(calibration(captions=False).glob("*.png")))

        def get_next(self) -> dict[str, Array] | None:
            """Return the next feed."""
            file = next(self._files, None)
            if file is None:
                return None
            return dict(processor(Image.open(file).convert("RGB"), return_tensors="np"))

    stages.begin("quantize_static image")
    quantize_static(
        folder / "image.onnx",
        folder / "image.int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    for name in ("text", "image"):
        stages.begin(f"quantize_dynamic {name}")
        quantize_dynamic(
            folder / f"{name}.onnx",
            folder / f"{name}.dynamic.onnx",
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            use_external_data_format=True,
        )


def _calibration_rate(count: int) -> dict[str, Any]:
    """Return images a second of a calibration, and of the encoder on ready tensors."""
    opened = open_bundle(bundle())
    role = opened.manifest.roles["image_encoder"]
    spec = RoleSpec(
        module=None,
        inputs=tuple(entry.spec() for entry in role.inputs),
        outputs=tuple(entry.spec() for entry in role.outputs),
        axes={},
        sample=lambda *_: {},
        trace_sizes={},
        proof_sizes=(),
        feeds={entry.name: entry.feed for entry in role.inputs},
        compare={},
    )
    files = sorted(jpegs(640, 480, 64).iterdir())
    listed = [files[at % len(files)] for at in range(count)]
    processors = {"image": open_processor(opened.manifest.processors["image"], opened.path)}
    model = opened.file(opened.variant("image_encoder", "fp32").models["onnxruntime"])
    ready = processors["image"](list(images(_BATCH, seed=5)))
    names = _ranged(model)

    def feeds() -> Iterator[Mapping[str, Array]]:
        return role_feeds(spec, processors, Samples({"image": listed}))

    with open_session(model) as session:

        def encode() -> None:
            for _ in range(0, count, _BATCH):
                session.run(ready)

        turns = {
            "calibration": lambda: collect_ranges(model, names, feeds),
            "encoder": encode,
        }
        wall, cpu = time_interleaved(turns, rounds=2)
    return {
        "pictures": count,
        "images_per_s": round(count / float(np.median(wall["calibration"])), 2),
        "encoder_images_per_s": round(count / float(np.median(wall["encoder"])), 2),
        "of_encoder_rate": round(float(np.median(wall["encoder"] / wall["calibration"])), 3),
        "cpu_over_encoder": round(float(np.median(cpu["calibration"] / cpu["encoder"])), 3),
    }


def _ranged(model: Path) -> list[str]:
    """Return the activations whose ranges static int8 needs."""
    import onnx_ir

    from mmedge.converters.passes.int8 import quantizable_inputs

    return quantizable_inputs(onnx_ir.load(model))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        timed = _Stages()
        child = {"mmedge": _convert, "plain": _plain}[sys.argv[2]]
        child(cast(Size, sys.argv[3]), Path(sys.argv[4]), timed)
        timed.begin("end")
        print(json.dumps({"stages": timed.seconds}))
    else:
        main()
