"""Precision search against naive int8 on trained models, on a split that neither saw.

Both shapes models, the plain one and the one with injected activation outliers (one function),
are converted with `--precision auto`: calibrated on one split, judged on a second. On a third, what
it chose is compared with fp32 and with ONNX Runtime's plain static int8 (min-max, one scale a
tensor).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from int8_peers import FeedReader
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from record import argument_parser, record

import mmedge
from mmedge.bundle import Bundle, open_bundle
from mmedge.converters.config import ConvertConfig
from mmedge.converters.evaluation.embedding_figures import Embeddings, Labels, task_quality
from mmedge.converters.request import convert
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array, Float32Array

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
_MAX_DROP = 0.01


def main() -> None:
    """Search, compare, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--calibration", type=int, default=300, help="scenes to calibrate on")
    parser.add_argument("--evaluation", type=int, default=300, help="scenes that the search sees")
    parser.add_argument("--test", type=int, default=500, help="held-out scenes")
    arguments = parser.parse_args()
    sys.path.insert(0, str(SHAPES))
    from generate import captioned, write_folder

    results: dict[str, Any] = {"max_drop": _MAX_DROP, "metric": "recall@1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(captioned("calibration", arguments.calibration), folder / "calibration", 64)
        # Another seed than the test's, of the split that training and calibration never see.
        write_folder(captioned("test", arguments.evaluation, 1), folder / "evaluation", 64)
        write_folder(captioned("test", arguments.test), folder / "test", 64)
        for model in ("clip", "clip-outliers"):
            results[model] = _compare(SHAPES / model, folder)
    record(arguments.output, results)


def _compare(source: Path, folder: Path) -> dict[str, Any]:
    out = folder / f"{source.name}.mmedge"
    report = convert(
        ConvertConfig(
            source=str(source),
            out=out,
            precisions=("auto",),
            calibration=folder / "calibration",
            evaluate=folder / "evaluation",
            max_drop=_MAX_DROP,
            metric="recall@1",
        )
    )
    files, captions = _read(folder / "test")
    known = Labels(captions=tuple(captions))
    embedded: dict[str, Embeddings] = {}
    for which, precision in (("fp32", "fp32"), ("auto", None)):
        with mmedge.DualEncoder.load(out, precision=precision, backend="onnxruntime") as model:
            # One at a time, as dynamic quantization is judged everywhere here.
            images = np.concatenate([model.encode_image([file]) for file in files])
            texts = np.concatenate([model.encode_text([caption]) for caption in captions])
        embedded[which] = Embeddings(images, texts, np.empty((0, images.shape[1]), np.float32))
    embedded["naive int8"] = _naive(open_bundle(out), folder, files, captions)
    figures: dict[str, Any] = {
        "chosen": {name: role.default for name, role in report.searched.items()},
        "search_s": round(report.duration_s, 1),
    }
    for which, embeddings in embedded.items():
        quality = task_quality(embedded["fp32"], embeddings, known)
        recall = quality.figures["recall@1"]
        lost = quality.drops.get("recall@1")
        cosine = float((embeddings.items * embedded["fp32"].items).sum(axis=1).mean())
        figures[which] = {
            "recall@1": round(recall.value, 4),
            "recall@1_lost": None if lost is None else round(lost.value, 4),
            "recall@1_lost_interval": None if lost is None else [lost.low, lost.high],
            "image_cosine_mean": round(cosine, 5),
        }
        drop = "-" if lost is None else f"{lost.value:+.4f} ({lost.low:+.4f} to {lost.high:+.4f})"
        print(f"{source.name:15}{which:12}recall@1 {recall.value:.4f}  lost {drop}")
    return figures


def _read(folder: Path) -> tuple[list[Path], list[str]]:
    lines = (folder / "captions.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [folder / entry["image"] for entry in entries], [entry["caption"] for entry in entries]


def _naive(
    bundle: Bundle, folder: Path, files: Sequence[Path], captions: Sequence[str]
) -> Embeddings:
    """Embed with ONNX Runtime's plain static int8 of the exported graphs."""
    processors = bundle.manifest.processors
    image = open_processor(processors["image"], bundle.path)
    text = open_processor(processors["text"], bundle.path)
    seen, said = _read(folder / "calibration")
    made = []
    for role, calibration, queries in (
        (
            "image_encoder",
            [image([x])[image.config.input] for x in seen],
            [image([x])[image.config.input] for x in files],
        ),
        (
            "text_encoder",
            [text([x])[text.config.input] for x in said],
            [text([x])[text.config.input] for x in captions],
        ),
    ):
        portable = bundle.file(bundle.variant(role, "fp32").models["portable"])
        made.append(_naive_role(portable, folder / f"naive-{role}.onnx", calibration, queries))
    return Embeddings(made[0], made[1], np.empty((0, made[0].shape[1]), np.float32))


def _naive_role(
    portable: Path, out: Path, calibration: Sequence[Array], queries: Sequence[Array]
) -> Float32Array:
    with open_session(portable) as session:
        name, output = session.inputs[0].name, session.outputs[0].name

    quantize_static(
        portable,
        out,
        FeedReader({name: feed} for feed in calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        # Not the additions: the causal mask's -3e38 would ruin any model's text tower.
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
    )
    with open_session(out) as session:
        rows = [session.run({name: query})[output] for query in queries]
    embeddings: Float32Array = np.concatenate(rows)
    return embeddings


if __name__ == "__main__":
    main()
