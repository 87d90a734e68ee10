"""Throughput of a folder of JPEG files beside the encoder's own rate, for three sizes of image.

Full-size ViT-B/32 CLIP, one thread of the engine, batches of 4. The encoder's own rate is
that of encode_image on a tensor that is preprocessed already. Beside it, in random order in each
round: encode_image_files with files prepared ahead in threads, the same in the calling thread alone
(what a single CPU does), the same with the JPEG draft on, and transformers' Pillow processor with
ONNX Runtime on the same graph, file by file into the same batches.

`of_encoder_rate` is of wall time: on a busy machine no CPU is free for the threads, and it says
nothing of overlap; `load_average_1min` stands in the file. CPU times hardly depend on the load:
`calling_thread_ms_per_image` is what the thread that runs the encoder does, `cpu_ms_per_image` what
all threads do. With two free CPUs an image takes the larger of the first and the rest, or half of
all if the rest is more: `of_encoder_rate_bound`, computed and not measured.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from encode_overhead import native
from full_size import CACHE, bundle, images, source
from interleaved import ratio
from PIL import Image
from record import argument_parser, record
from transformers import CLIPImageProcessorPil

import mmedge
from mmedge.models import images as preparing
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array

SIZES = {(640, 480): 32, (1280, 720): 32, (4000, 3000): 12}
"""Width and height, and how many files; every fourth is another image."""
BATCH = 4


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="int8", help="variant of the image encoder")
    arguments = parser.parse_args()
    options = SessionOptions(threads=1)
    whole, small = (
        mmedge.DualEncoder.load(
            path,
            device=arguments.device,
            precision=arguments.precision,
            backend="onnxruntime",
            roles=["image_encoder"],
            options=options,
        )
        for path in (bundle(), _with_draft(bundle()))
    )
    reference = CLIPImageProcessorPil.from_pretrained(source())
    results: dict[str, Any] = {"rounds": arguments.rounds, "batch": BATCH, "engine_threads": 1}
    results["cpus"] = len(os.sched_getaffinity(0))
    with whole, small:
        session = native(whole.sessions["image_encoder"])
        for (width, height), count in SIZES.items():
            folder = jpegs(width, height, count)
            files = sorted(folder.iterdir())
            tensor = whole.image_processor(files)["pixel_values"]
            calls: dict[str, Callable[[], Any]] = {
                "encoder": partial(whole.encode_image, tensor, batch_size=BATCH),
                "ahead": partial(whole.encode_image_files, files, batch_size=BATCH),
                "in_line": partial(_in_line, whole, files),
                "draft": partial(small.encode_image_files, files, batch_size=BATCH),
                "transformers": partial(_transformers, reference, session, files),
            }
            figures = _measure(calls, arguments.rounds, count)
            cosines = np.sum(calls["draft"]().embeddings * calls["ahead"]().embeddings, axis=1)
            figures["draft"]["cosine_min"] = round(float(cosines.min()), 5)
            results[f"{width}x{height}"] = figures
            _show(f"{width}x{height}", figures)
    record(arguments.output, results)


def _measure(
    calls: dict[str, Callable[[], Any]], rounds: int, count: int
) -> dict[str, dict[str, Any]]:
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    seconds = {name: np.empty((len(clocks), rounds)) for name in calls}
    for call in calls.values():
        call()
    rng = np.random.default_rng(0)
    for index in range(rounds):
        for name in rng.permutation(list(calls)):
            started = [clock() for clock in clocks]
            calls[name]()
            seconds[name][:, index] = [
                clock() - at for clock, at in zip(clocks, started, strict=True)
            ]
    figures = {}
    own = float(np.median(seconds["encoder"][1]))
    for name, (wall, cpu, calling) in seconds.items():
        in_all, here = float(np.median(cpu)), float(np.median(calling))
        figures[name] = {
            "images_per_s": round(count / float(np.median(wall)), 2),
            "cpu_ms_per_image": round(in_all / count * 1e3, 2),
            "calling_thread_ms_per_image": round(here / count * 1e3, 2),
            "of_encoder_rate": ratio(seconds["encoder"][0] / wall),
            "of_encoder_rate_bound": round(own / max(here, in_all / 2), 3),
        }
    return figures


def _show(size: str, figures: dict[str, dict[str, Any]]) -> None:
    for name, one in figures.items():
        share = one["of_encoder_rate"]
        print(
            f"{size:10} {name:13} {one['images_per_s']:8.1f} images/s, "
            f"{one['cpu_ms_per_image']:6.1f} CPU ms an image, "
            f"{one['calling_thread_ms_per_image']:6.1f} in the calling thread; "
            f"{share['median']:.2f} ({share['low']:.2f} to {share['high']:.2f}) of the encoder's "
            f"rate, {one['of_encoder_rate_bound']:.2f} on two free CPUs"
        )


def _in_line(model: mmedge.DualEncoder, files: list[Path]) -> Any:  # noqa: ANN401
    """Encode with images prepared in the calling thread, as where a single CPU is allowed."""
    with mock.patch.object(preparing, "worker_threads", return_value=0):
        return model.encode_image_files(files, batch_size=BATCH)


def _transformers(reference: CLIPImageProcessorPil, session: Any, files: list[Path]) -> Array:  # noqa: ANN401
    parts = []
    for start in range(0, len(files), BATCH):
        opened = [Image.open(path) for path in files[start : start + BATCH]]
        pixels = reference(opened, return_tensors="np")["pixel_values"]
        parts.append(session.run(None, {"pixel_values": pixels})[0])
    return np.concatenate(parts)


def _with_draft(path: Path) -> Path:
    """Return the same bundle with the JPEG draft on; its files are linked."""
    out = path.with_name(f"{path.stem}-draft.mmedge")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(path, out, copy_function=os.link)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["processors"]["image"]["steps"][0]["jpeg_draft"] = True
    (out / "manifest.json").unlink()
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


def jpegs(width: int, height: int, count: int) -> Path:
    """Return a folder of JPEG files of quality 90, made on the first call."""
    folder = CACHE / f"jpegs-{width}x{height}-{count}"
    if not folder.is_dir():
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        made = list(images(4, seed=3, size=(height, width)))
        for index in range(count):
            Image.fromarray(made[index % 4]).save(partial_folder / f"{index:03}.jpg", quality=90)
        partial_folder.rename(folder)
    return folder


if __name__ == "__main__":
    main()
