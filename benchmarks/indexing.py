"""Indexing a folder of JPEGs beside the encoder alone, at its own best batch.

Full-size ViT-B/32 CLIP in int8 with random weights. The encoder runs on tensors that are ready, in
three ways: `loaded`, as mmedge.load opens it, all CPUs on one batch; `bulk`, as an index loads it,
a batch on each CPU; and `one_cpu`, one batch on one CPU, which leaves the others to decoding as an
accelerator does. Each gets the batch size, up to the bundle's, at which it took the least time
here. Indexing reads, decodes, prepares, encodes and writes every file of a folder to a new index,
durably, with the model of `bulk`, or of `one_cpu`. All take turns; a ratio is the median over the
rounds of the throughput within the round.

`prepare` is the CPU time of decoding and preprocessing alone. What it takes of the CPUs the encoder
cannot have, so where both share all CPUs nothing reaches more than `bound` of the encoder's
throughput: the encoder's CPU time over the sum of both. On a busy machine wall times say little;
the ratio of CPU times (`cpu_time_ratio_to_bulk`) is that of throughput where all CPUs are in use.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from full_size import CACHE, bundle, images
from interleaved import ratio, time_interleaved
from PIL import Image
from record import argument_parser, record

from mmedge.models.dual_encoder import DualEncoder
from mmedge.models.load import load_as
from mmedge.retrieval.folders import index_folder
from mmedge.retrieval.index import Index
from mmedge.retrieval.throughput import BulkModel, load_bulk_model
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array, Modality

_SIZES = {"640x480": (480, 640), "1280x720": (720, 1280)}
_DIFFERENT = 32  # images; files beyond it repeat them
_BACKEND = "onnxruntime"  # on all sides


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96, help="files a folder")
    arguments = parser.parse_args()
    count, rounds = arguments.images, arguments.rounds
    load = partial(
        load_as,
        DualEncoder,
        bundle(),
        precision="int8",
        backend=_BACKEND,
        roles=["image_encoder"],
    )
    with ExitStack() as stack:
        bulk = load_bulk_model(bundle(), "int8", _BACKEND)
        one = load(options=SessionOptions(threads=1, spin=False))
        ways = {"loaded": BulkModel(load(), 1), "bulk": bulk, "one_cpu": BulkModel(one, 1)}
        for way in ways.values():
            stack.enter_context(way.model)
        batches = {name: _best_batch(way, 32, 3) for name, way in ways.items()}
        turns: dict[str, Callable[[], object]] = {
            name: partial(_encode, way, batches[name], count) for name, way in ways.items()
        }
        folders = {name: _folder(name, count) for name in _SIZES}
        for name, folder in folders.items():
            turns[name] = partial(_index, bulk, folder, count)
            turns[f"{name} one_cpu"] = partial(_index, ways["one_cpu"], folder, count)
            turns[f"prepare {name}"] = partial(_prepare, one, folder)
        wall, cpu = time_interleaved(turns, rounds)
    results: dict[str, Any] = {"rounds": rounds, "images": count, "best_batch": batches}
    results["encoder"] = {name: _times(wall[name], cpu[name], count) for name in ways}
    for name, folder in folders.items():
        prepare = float(np.median(cpu[f"prepare {name}"]))
        encode = float(np.median(cpu["bulk"]))
        results[name] = {
            "file_kb": round(sum(f.stat().st_size for f in folder.iterdir()) / count / 1e3, 1),
            "prepare_cpu_ms_an_image": round(prepare / count * 1e3, 2),
            "bound": round(encode / (encode + prepare), 3),
            **_times(wall[name], cpu[name], count),
            "throughput_over_loaded": ratio(wall["loaded"] / wall[name]),
            "throughput_over_bulk": ratio(wall["bulk"] / wall[name]),
            "cpu_time_ratio_to_bulk": ratio(cpu["bulk"] / cpu[name]),
            "one_cpu": {
                **_times(wall[f"{name} one_cpu"], cpu[f"{name} one_cpu"], count),
                "throughput_over_one_cpu": ratio(wall["one_cpu"] / wall[f"{name} one_cpu"]),
            },
        }
    print(json.dumps(results, indent=2))
    record(arguments.output, results)


def _times(wall: Array, cpu: Array, count: int) -> dict[str, float]:
    """Return medians in milliseconds an image."""
    return {
        "wall_ms_an_image": round(float(np.median(wall)) / count * 1e3, 2),
        "cpu_ms_an_image": round(float(np.median(cpu)) / count * 1e3, 2),
    }


def _best_batch(way: BulkModel, count: int, rounds: int) -> int:
    """Return the batch size at which a way takes the least time for so many images."""
    axis = way.model.sessions["image_encoder"].inputs[0].shape[0]
    most = way.model.manifest.roles["image_encoder"].axes[str(axis)].max
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= most]
    wall, _ = time_interleaved(
        {str(size): partial(_encode, way, size, count) for size in sizes}, rounds
    )
    return min(sizes, key=lambda size: float(wall[str(size)].min()))


def _encode(way: BulkModel, batch: int, count: int) -> None:
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    feed = {way.model.image_processor.config.input: pixels}
    with ThreadPoolExecutor(way.encoders) as pool:
        calls = [
            pool.submit(way.model.encode_prepared, Modality.IMAGE, feed)
            for _ in range(count // batch)
        ]
        for call in calls:
            call.result()


def _prepare(model: DualEncoder, folder: Path) -> None:
    for file in folder.iterdir():
        model.prepare(Modality.IMAGE, file.read_bytes(), shrink=True)


def _index(bulk: BulkModel, folder: Path, count: int) -> None:
    with (
        tempfile.TemporaryDirectory() as place,
        Index.create(Path(place) / "x.index", dim=bulk.model.embedding_dim) as index,
    ):
        report = index_folder(index, bulk, folder)
    if report.added != count:
        raise RuntimeError(f"{folder}: got {report}, expected {count} added.")


def _folder(name: str, count: int) -> Path:
    """Return a folder of so many JPEGs of a size, made once."""
    folder = CACHE / f"jpegs-{name}-{count}"
    if folder.is_dir():
        return folder
    beside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for number, image in enumerate(images(min(count, _DIFFERENT), 5, _SIZES[name])):
        Image.fromarray(image).save(beside / f"{number:05}.jpg", quality=90)
    for number in range(_DIFFERENT, count):
        first = beside / f"{number % _DIFFERENT:05}.jpg"
        shutil.copy(first, beside / f"{number:05}.jpg")
    beside.rename(folder)
    return folder


if __name__ == "__main__":
    main()
