"""Full-size CLIP on this CPU: mmedge beside the named peers, in one interleaved run.

Peers: torch eager and torch.compile with transformers; ONNX Runtime on the plain fp32 export; ONNX
Runtime's own quantize_dynamic and quantize_static; OpenVINO fp32 and NNCF int8. Every contestant
gets the same tensors, one after the other in random order, round after round; a ratio is the median
over the rounds of (mmedge / peer) within the round, with a bootstrap interval of 95 %. Cosines are
against torch eager on held-out images (or ids) that no calibration saw; the weights are random,
so they compare the methods' arithmetic, not a trained model's accuracy.

Two lower bounds are reported beside them, neither of which could be a model:

- computed: the operations that one image or text needs (those of the pooled token only, after the
  last block's keys and values; attention's products are counted), divided by the rate of a large
  int8 product that stays in the caches, measured in the same run in ONNX Runtime and in OpenVINO,
  the faster of both. "times the floor" is a contestant's shortest time over it, whatever its
  precision. See int8_floor.py.
- measured: the products alone, each of the encoder's int8 products in its own size and with weights
  of its own, and nothing else (not attention's products), a contestant too, in ONNX Runtime
  and in OpenVINO. "times the products alone" is a contestant's time over that of the faster engine
  within the round, median over the rounds. See products_alone.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_contestants import Call, contestants, tensors, token_ids
from full_size import SIZES, Size, source
from int8_floor import int8_rate, operations
from interleaved import ratio, time_interleaved
from products_alone import Product, alone_in_onnxruntime, alone_in_openvino, products
from record import argument_parser, int8_instructions, record
from transformers import CLIPConfig

from mmedge.specs import Array

_TEXT_LENGTHS = (8, 12, 16, 32, 77)


@dataclass(frozen=True, slots=True)
class Floors:
    """Lower bounds of one benchmark.

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
        instructions = int8_instructions()
        kind = "_amx" if "amx_int8" in instructions else "" if instructions else "_without_vnni"
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
            entered = contestants(size, "image_encoder", Path(folder), arguments.threads)
            frames = tensors(size, 33, seed=2)
            for batch in (1, 8):
                feed = np.concatenate(frames[:batch])
                rounds = arguments.rounds if batch == 1 else max(10, arguments.rounds // 6)
                floors = Floors(
                    batch * operations(config.vision_config, "image") / rate,
                    _alone(products(config.vision_config, "image", batch), arguments.threads),
                )
                results[f"image_batch_{batch}"] = _race(entered, feed, frames[1:], rounds, floors)
        if arguments.only != "image":
            entered = contestants(size, "text_encoder", Path(folder), arguments.threads)
            for length in _TEXT_LENGTHS:
                ids = [token_ids(length, seed=1000 + seed) for seed in range(33)]
                floors = Floors(
                    operations(config.text_config, "text", length) / rate,
                    _alone(products(config.text_config, "text", 1, length), arguments.threads),
                )
                results[f"text_{length}_tokens"] = _race(
                    entered, ids[0], ids[1:], arguments.rounds, floors
                )
    record(arguments.output, results)


def _alone(wanted: list[Product], threads: int) -> dict[str, Callable[[], object]]:
    return {
        "onnxruntime": alone_in_onnxruntime(wanted, threads),
        "openvino": alone_in_openvino(wanted, threads),
    }


def _race(
    entered: dict[str, Call],
    feed: Array,
    held_out: list[Array],
    rounds: int,
    floors: Floors,
) -> dict[str, Any]:
    """Run all interleaved and compare them within each round."""
    reference = np.concatenate([entered["torch eager"](x) for x in held_out])
    cosines = {}
    for name, call in entered.items():
        answers = np.concatenate([call(x) for x in held_out])
        cosines[name] = (answers * reference).sum(axis=1)
    turns: dict[str, Callable[[], object]] = {
        name: partial(call, feed) for name, call in entered.items()
    }
    turns |= {_alone_in(engine): call for engine, call in floors.alone.items()}
    wall, cpu = time_interleaved(turns, rounds)
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
    for ours in (name for name in entered if name.startswith("mmedge")):
        for peer in (name for name in entered if not name.startswith("mmedge")):
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
