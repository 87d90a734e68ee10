"""Peak memory of calibrating and quantizing an image encoder to static int8, by number of images.

Every count is a fresh process that lists a folder of that many distinct images, decodes each once
to check it, then reads them all again for every reading that the choice of ranges needs, in batches
of 8, and writes the quantized graph. Peak resident memory is what the process reads of itself at
its end (VmHWM).

--size small: the image encoder of the trained shapes CLIP, 64x64 PNG images; 10,000 of them take
about two minutes. --size full: full-size ViT-B/32 with random weights, 320x240 PNG images; about
an hour for 10,000 on one core. Images are made once and kept in the benchmarks' cache folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from record import argument_parser, record

from mmedge.bundle import open_bundle
from mmedge.converters.data.checks import check_dataset
from mmedge.converters.data.datasets import read_dataset
from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.quantization.quantize import quantize
from mmedge.preprocess.registry import open_processor
from mmedge.specs import Array, Modality

_BATCH = 8
_SIZES = {"small": (64, 64), "full": (240, 320)}


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--counts", default="100,10000", help="numbers of images")
    parser.add_argument("--size", choices=list(_SIZES), default="small")
    parser.add_argument(
        "--ranges", choices=["minmax", "percentile", "entropy", "mse"], default="mse"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "size": arguments.size,
        "ranges": arguments.ranges,
        "picture_size": "x".join(map(str, _SIZES[arguments.size][::-1])),
    }
    bundle = _bundle(arguments.size)
    for count in map(int, arguments.counts.split(",")):
        words = [str(bundle), str(_pictures(arguments.size, count)), arguments.ranges]
        done = subprocess.run(
            [sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, check=True
        )
        results[str(count)] = figures = json.loads(done.stdout)
        print(
            f"{count} images: peak {figures['peak_rss_mib']:.1f} MiB, "
            f"{figures['pictures_read']} images read in {figures['wall_s']:.0f} s"
        )
    record(arguments.output, results)


def _bundle(size: str) -> Path:
    """Return a bundle with the image encoder to calibrate, converted once."""
    import full_size  # torch: not in the process that is measured

    if size == "full":
        return full_size.bundle()
    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.request import convert

    out = full_size.CACHE / "clip-shapes.mmedge"
    if not (out / "manifest.json").is_file():
        source = Path(__file__).parents[1] / "examples" / "shapes" / "clip"
        convert(ConvertConfig(source=str(source), out=out, precisions=("fp32",)))
    return out


def _pictures(size: str, count: int) -> Path:
    """Return a folder of distinct images, made once."""
    import full_size
    from PIL import Image

    folder = full_size.CACHE / f"calibration-{size}-{count}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(full_size.images(count, seed=2, size=_SIZES[size])):
            Image.fromarray(image).save(partial / f"{index:06}.png", compress_level=1)
        partial.rename(folder)
    return folder


def _calibrate(path: Path, folder: Path, ranges: Any) -> dict[str, float]:  # noqa: ANN401
    """Calibrate as a conversion does, and return what this process took for it."""
    started = time.monotonic()
    bundle = open_bundle(path)
    processor = open_processor(bundle.manifest.processors["image"], bundle.path)
    dataset = check_dataset(read_dataset(folder)).data
    checked_mib = _status_mib("VmHWM")
    pictures_read = len(dataset.samples)

    def feeds() -> Iterator[Mapping[str, Array]]:
        nonlocal pictures_read
        images = dataset.items(Modality.IMAGE)
        for start in range(0, len(images), _BATCH):
            feed = processor(images[start : start + _BATCH])
            pictures_read += len(images[start : start + _BATCH])
            yield feed

    model = bundle.model_path(bundle.variant("image_encoder", "fp32"))
    with tempfile.TemporaryDirectory() as out:
        quantize(model, Path(out) / "int8.onnx", StaticInt8(ranges=ranges), calibration=feeds)
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported: its memory would be taken for the calibration's")
    return {
        "peak_rss_mib": _status_mib("VmHWM"),
        "peak_rss_when_checked_mib": checked_mib,
        "pictures_read": pictures_read,
        "wall_s": round(time.monotonic() - started, 1),
    }


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_calibrate(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
    else:
        main()
