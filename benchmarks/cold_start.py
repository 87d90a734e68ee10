"""From process start to the first image embedding: mmedge beside transformers + torch.

Full-size ViT-B/32 CLIP, one PNG image, each start a fresh process, contestants alternating round by
round. Wall and CPU time are the operating system's own account of the finished process (wait4),
peak resident memory is what the process reads of itself at its end (VmHWM; wait4's would take in
this process, from which it was forked). All read warm files. Every contestant loads both towers,
except where the name differs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from full_size import bundle, images, source
from PIL import Image
from record import argument_parser, record

_TORCH = """
import sys
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel
torch.set_num_threads(int(sys.argv[4]))
model = CLIPModel.from_pretrained(sys.argv[1]).eval()
processor = CLIPImageProcessorPil.from_pretrained(sys.argv[1])
with torch.inference_mode():
    inputs = processor(images=Image.open(sys.argv[3]).convert("RGB"), return_tensors="pt")
    vector = model.get_image_features(**inputs).pooler_output
    vector = torch.nn.functional.normalize(vector, dim=-1)
assert vector.shape == (1, 512)
"""
_MMEDGE = """
import sys
import mmedge
options = mmedge.SessionOptions(threads=int(sys.argv[4]){settings})
model = mmedge.load(sys.argv[2], {arguments}, backend="onnxruntime", options=options)
vector = model.encode_image(sys.argv[3])
assert vector.shape == (1, 512)
"""
_PEAK = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
_CONTESTANTS = {
    "transformers + torch": _TORCH,
    "mmedge fp32": _MMEDGE.format(arguments='precision="fp32"', settings=""),
    "mmedge int8": _MMEDGE.format(arguments='precision="int8"', settings=""),
    "mmedge int8, weights left as they lie": _MMEDGE.format(
        arguments='precision="int8"', settings=", prepack=False"
    ),
    "mmedge int8, image encoder alone": _MMEDGE.format(
        arguments='precision="int8", roles=["image_encoder"]', settings=""
    ),
}


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.fromarray(next(images(1, seed=3))).save(image)
        words = [str(source()), str(bundle()), str(image), str(arguments.threads)]
        for script in _CONTESTANTS.values():  # bytecode and file cache are warm for all
            _start(script, words)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in _CONTESTANTS}
        for _ in range(arguments.rounds):
            for name, script in _CONTESTANTS.items():
                samples[name].append(_start(script, words))
    results: dict[str, Any] = {"rounds": arguments.rounds, "threads": arguments.threads}
    peer = samples["transformers + torch"]
    print(f"{'':40}{'wall s':>8}{'cpu s':>8}{'peak MiB':>10}   of torch: wall, cpu, peak")
    for name, runs in samples.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        shares = {
            f"{key}_share_of_torch": round(
                statistics.median(
                    run[key] / other[key] for run, other in zip(runs, peer, strict=True)
                ),
                4,
            )
            for key in medians
        }
        results[name] = {key: round(value, 3) for key, value in medians.items()} | shares
        print(
            f"{name:40}{medians['wall_s']:8.2f}{medians['cpu_s']:8.2f}"
            f"{medians['peak_rss_mib']:10.0f}   " + ", ".join(f"{v:.3f}" for v in shares.values())
        )
    record(arguments.output, results)


def _start(script: str, words: list[str]) -> dict[str, float]:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", script + _PEAK, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak_kib, errors = (pipe.read() if pipe else "" for pipe in (process.stdout, process.stderr))
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = status  # reaped here, not by Popen
    if status:
        sys.exit(errors)
    return {
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": int(peak_kib) / 1024,
    }


if __name__ == "__main__":
    main()
