"""Encoders of real size in int8 on this CPU: mmedge beside ONNX Runtime and OpenVINO.

Image encoders of EVA-02-CLIP, SigLIP, CLIP, DINOv2, ResNet-50 and OWLv2, and CLAP's audio encoder,
with random weights. Peers, all on the plain export of torch: ONNX Runtime fp32, quantize_dynamic
and quantize_static (QDQ, unsigned activations, its other settings left alone), OpenVINO fp32 and
NNCF. All are calibrated on the same synthetic samples. Every contestant gets the same tensors, in
random order, round after round; a ratio is the median over the rounds of (mmedge / peer) within
the round, with its 95 % interval. Cosines are those of every output, flattened, with ONNX Runtime's
in fp32, the lowest of the outputs, on held-out samples; weights are random, so they compare the
methods' arithmetic, no accuracy. Memory is the peak (VmHWM) of a fresh process that opens the
graph and runs it three times.

Models and graphs are made first and kept: --prepare makes them and measures nothing. Results of
several runs are merged into one file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import ratio, time_interleaved
from real_size_contestants import Contestant, held_out, prepare
from real_size_names import SUBJECTS
from real_size_run import Call, open_contestant
from record import argument_parser, record

from mmedge.specs import Array

_HELD_OUT = {"owlv2-base": 2}


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SUBJECTS))
    parser.add_argument("--prepare", action="store_true", help="make models and graphs, then end")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.output.is_file():
        results = json.loads(arguments.output.read_text("utf-8"))["results"]
    for name in arguments.models or SUBJECTS:
        entered = prepare(name)
        samples = held_out(name)
        if arguments.prepare:
            continue
        label = f"{name}, batch {arguments.batch}, threads {arguments.threads}"
        results[label] = _measure(
            name, entered, samples, arguments.threads, arguments.batch, arguments.rounds
        )
        record(arguments.output, results)


def _measure(
    name: str,
    entered: dict[str, Contestant],
    samples: list[dict[str, Array]],
    threads: int,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    print(f"\n{SUBJECTS[name]}, batch {batch}, {threads} threads")
    feed = {key: np.concatenate([x[key] for x in samples[:batch]]) for key in samples[0]}
    figures: dict[str, dict[str, Any]] = {
        label: {"peak_rss_mib": _peak(one, threads, feed)} for label, one in entered.items()
    }
    calls = {
        label: open_contestant(one.engine, one.model, threads) for label, one in entered.items()
    }
    samples = samples[: _HELD_OUT.get(name, len(samples))]
    reference = [calls["onnxruntime fp32"](sample) for sample in samples]
    for label, call in calls.items():
        cosines = _cosines(call, samples, reference)
        figures[label] |= {
            "cosine_mean": round(float(cosines.mean()), 6),
            "cosine_min": round(float(cosines.min()), 6),
        }
    turns = {label: partial(call, feed) for label, call in calls.items()}
    wall, cpu = time_interleaved(turns, rounds)
    for label, found in figures.items():
        found["wall_p50_ms"] = round(float(np.median(wall[label])) * 1e3, 3)
        found["cpu_p50_ms"] = round(float(np.median(cpu[label])) * 1e3, 3)
        print(
            f"{label:34}{found['wall_p50_ms']:10.2f}{found['cpu_p50_ms']:10.2f} ms"
            f"{found['cosine_mean']:10.5f}{found['cosine_min']:10.5f}"
            f"{found['peak_rss_mib']:8.0f} MiB"
        )
    ours = [label for label in calls if label.startswith("mmedge")]
    peers = [label for label in calls if not label.startswith("mmedge")]
    return {
        "rounds": rounds,
        "held_out": len(samples),
        "contestants": figures,
        "ratios": {
            f"{mine} / {peer}": {
                "wall": ratio(wall[mine] / wall[peer]),
                "cpu": ratio(cpu[mine] / cpu[peer]),
            }
            for mine in ours
            for peer in peers
        },
    }


def _peak(contestant: Contestant, threads: int, feed: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "feed.npz"
        np.savez(file, **feed)
        program = "import real_size_run; real_size_run.print_peak()"
        words = (contestant.engine, contestant.model, threads, file)
        run = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,  # where -c imports from
        )
    return round(int(run.stdout.split()[-1]) / 1024, 1)


def _cosines(
    call: Call, samples: list[dict[str, Array]], reference: list[dict[str, Array]]
) -> Array:
    """Return the lowest cosine over the outputs, for each sample."""
    lowest = []
    for sample, expected in zip(samples, reference, strict=True):
        got = call(sample)
        cosines = []
        for key in expected:
            a, b = got[key].ravel(), expected[key].ravel()
            cosines.append(float(np.dot(a, b)) / float(np.linalg.norm(a) * np.linalg.norm(b)))
        lowest.append(min(cosines))
    return np.array(lowest)


if __name__ == "__main__":
    main()
