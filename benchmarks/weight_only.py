"""Weight-only quantization: size against fp16, error, fidelity and time, beside ONNX Runtime's own.

- trained: both encoders of the shapes CLIP, over methods, group sizes and zero points: cosine with
  float32 on the test split, and text-to-image recall@1. The only weights here that were trained.
- decoder: a GPT-2 of 124 million random parameters with heavy tails; cosine of the logits of the
  last token, and time for one token (one row for every product, as in decoding) and for 64.
- encoder: the image encoder of ViT-L/14, 304 million random parameters.

ONNX Runtime's tools get the same graph, with Gemm as MatMul and the decoder's head untied, as they
take no other. Sizes are those of all constants of a graph, over the same weights in fp16 (float32
by half). Random weights show size and time; their fidelity is weak evidence. GPTQ and the choice of
the layers at 2 bits (at25) see other inputs than those that fidelity is measured on. --all runs
every combination on the decoder and the encoder too.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from interleaved import ratio, time_interleaved
from record import argument_parser, record
from weight_only_peer import Peer
from weight_only_subjects import Feed, Subject, decoder, encoder, trained

from mmedge.converters.methods.configs import WeightOnly
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.passes.weight_only import moment_inputs
from mmedge.converters.quantization.size_target import (
    choose_lowered,
    constant_bytes,
    half_bytes,
    lowered_bits,
    weight_only_pass,
)
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.statistics.collect import collect_moments
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.specs import Float32Array

_ROUNDS = {"decoder": 40, "encoder": 9}
_GROUP_SIZES = (32, 64, 128)
_DECODER = (
    "int4",
    "int4-g128",
    "int4-g128-asymmetric",
    "int4-g256",
    "int4-gptq",
    "int4-g128-gptq",
    "int4-g128-at25",
    "int4-g128-gptq-at25",
    "int8-weight-g128",
)
_ENCODER = (
    "int4",
    "int4-g128",
    "int4-g128-asymmetric",
    "int4-g128-gptq",
    "int4-g128-gptq-at25",
    "int8-weight-g128",
)
_PEERS = (Peer("rtn", 32), Peer("rtn", 128), Peer("rtn", 128, symmetric=False))
_TIMED = (
    "int4",
    "int4-g128",
    "int4-g128-gptq-at25",
    "int8-weight-g128",
    "onnxruntime int4-g32",
    "onnxruntime int4-g128",
)


@dataclass(frozen=True)
class Ours:
    """A contestant of mmedge: a recipe by name."""

    name: str

    @property
    def config(self) -> WeightOnly:
        """Return the method behind the name."""
        (method,) = parse_recipe(self.name).methods.values()
        if not isinstance(method, WeightOnly):
            raise TypeError(f"{self.name} is not weight-only")
        return method


@dataclass
class Measured:
    """A contestant's figures, and its outputs for the held-out inputs."""

    figures: dict[str, Any]
    outputs: Float32Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument(
        "--only", choices=["trained", "decoder", "encoder"], action="append", help="one part"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    parts = arguments.only or ["trained", "decoder", "encoder"]
    results: dict[str, Any] = {"threads": 1}
    with tempfile.TemporaryDirectory() as name, quiet_libraries():
        work = Path(name)
        if "trained" in parts:
            results["trained"] = _trained(work)
        for part, subject, names in (
            ("decoder", decoder, _DECODER),
            ("encoder", encoder, _ENCODER),
        ):
            if part in parts:
                contestants = [*map(Ours, names), *_PEERS, *(_grid() if arguments.all else ())]
                results[part] = _full_size(part, subject(), list(dict.fromkeys(contestants)), work)
    record(arguments.output, results)


def _grid() -> Iterator[Ours | Peer]:
    """Every method with every group size, with and without zero points, and the peers."""
    for group_size in _GROUP_SIZES:
        group = "" if group_size == 32 else f"-g{group_size}"
        for settings in ("", "-asymmetric", "-hqq", "-gptq", "-gptq-asymmetric"):
            yield Ours(f"int4{group}{settings}")
        yield Ours(f"int4{group}-at25")
        yield Ours(f"int4{group}-gptq-at25")
        yield Peer("rtn", group_size)
        yield Peer("rtn", group_size, symmetric=False)
        yield Peer("hqq", group_size)


def _trained(work: Path) -> dict[str, Any]:
    """Quantize both encoders of the trained model by every method; recall of both together."""
    pair = trained()
    reference = [_outputs(subject.model, subject.held_out) for subject in pair]
    results: dict[str, Any] = {
        "samples": len(reference[0]),
        "recall_at_1_fp32": _recall(*reference),
        "contestants": {},
    }
    moments = [_moments(subject) for subject in pair]
    for contestant in (*_grid(), Ours("int8-weight")):
        sides: dict[str, Any] = {}
        outputs = []
        for subject, expected, moment in zip(pair, reference, moments, strict=True):
            measured = _measure(contestant, subject, expected, moment, work / "few.onnx")
            outputs.append(measured.outputs)
            sides[subject.name.split()[1]] = measured.figures
        sides["recall_at_1"] = _recall(*outputs)
        results["contestants"][contestant.name] = sides
        figures = "  ".join(
            f"{side} {sides[side]['size_to_fp16']:.3f} {sides[side]['cosine_mean']:.5f}"
            for side in ("image", "text")
        )
        print(
            f"trained  {contestant.name:34} {figures}  R@1 {sides['recall_at_1']:.3f}", flush=True
        )
    print(f"trained  {'fp32':34} R@1 {results['recall_at_1_fp32']:.3f}")
    return results


def _full_size(
    part: str, subject: Subject, contestants: Sequence[Ours | Peer], work: Path
) -> dict[str, Any]:
    expected = _outputs(subject.model, subject.held_out)
    started = time.monotonic()
    moments = _moments(subject)
    results: dict[str, Any] = {
        "samples": len(expected),
        "moments_s": time.monotonic() - started,
        "contestants": {},
    }
    timed = {"fp32": subject.model}
    for index, contestant in enumerate(contestants):
        out = work / f"{part}-{index}.onnx"
        figures = _measure(contestant, subject, expected, moments, out).figures
        results["contestants"][contestant.name] = figures
        error = figures["weight_error_mean"]
        print(
            f"{part}  {contestant.name:34} {figures['size_to_fp16']:.4f} of fp16  "
            f"weights {'     ' if error is None else f'{error:.3f}'}  cosine mean "
            f"{figures['cosine_mean']:.5f} min {figures['cosine_min']:.5f}  same largest "
            f"{figures['same_largest']:.2f}  made in {figures['made_in_s']:.0f} s",
            flush=True,
        )
        if contestant.name in _TIMED:
            timed[contestant.name] = out
        else:
            out.unlink()
            out.with_name(f"{out.name}.data").unlink()
    results["times"] = _times(timed, subject.timed, _ROUNDS[part])
    return results


def _measure(
    contestant: Ours | Peer,
    subject: Subject,
    expected: Float32Array,
    moments: Mapping[str, Float32Array],
    out: Path,
) -> Measured:
    started = time.monotonic()
    figures: dict[str, Any] = {"weight_error_mean": None}
    if isinstance(contestant, Peer):
        contestant.quantize(subject.model, out)
    else:
        figures |= _quantize(contestant.config, subject, moments, out)
    figures["made_in_s"] = time.monotonic() - started
    figures["size_bytes"] = constant_bytes(ir.load(out))
    figures["size_to_fp16"] = figures["size_bytes"] / half_bytes(ir.load(subject.model))
    outputs = _outputs(out, subject.held_out)
    norms = np.linalg.norm(outputs, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (outputs * expected).sum(axis=1) / norms
    figures["cosine_mean"] = float(cosines.mean())
    figures["cosine_min"] = float(cosines.min())
    figures["same_largest"] = float((outputs.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return Measured(figures, outputs)


def _quantize(
    config: WeightOnly, subject: Subject, moments: Mapping[str, Float32Array], out: Path
) -> dict[str, Any]:
    lowered = choose_lowered(
        subject.model,
        config,
        lambda: subject.calibration,
        moments=moments,
        samples=subject.sensitivity_samples,
    )
    model = ir.load(subject.model)
    step = weight_only_pass(replace(config, lowered=tuple(lowered)), moments)
    step(model)
    ir.save(model, out, external_data=f"{out.name}.data", size_threshold_bytes=1024)
    errors = [weight.weight_error for weight in step.weights if weight.weight_error is not None]
    return {
        "weight_error_mean": statistics.fmean(errors),
        "left_in_float": [weight.name for weight in step.weights if weight.reason],
        "lowered": {
            weight.name: {"bits": lowered_bits(config), "alone": lowered[weight.name]}
            for weight in step.weights
            if weight.name in lowered
        },
    }


def _moments(subject: Subject) -> dict[str, Float32Array]:
    names = moment_inputs(ir.load(subject.model))
    return collect_moments(subject.model, names, lambda: iter(subject.calibration))


def _open(model: Path) -> Session:
    return open_session(model, options=SessionOptions(threads=1))


def _outputs(model: Path, feeds: Sequence[Feed]) -> Float32Array:
    with _open(model) as session:
        output = session.outputs[0].name
        rows = [session.run(feed)[output][0] for feed in feeds]
    outputs: Float32Array = np.stack(rows)
    return outputs


def _recall(images: Float32Array, texts: Float32Array) -> float:
    return float(((texts @ images.T).argmax(axis=1) == np.arange(len(texts))).mean())


def _times(models: Mapping[str, Path], feeds: Mapping[str, Feed], rounds: int) -> dict[str, Any]:
    """Time all interleaved; return each time and its ratio to float32 of the same round."""
    sessions = {name: _open(model) for name, model in models.items()}
    taken: dict[str, dict[str, Any]] = {}
    for about, feed in feeds.items():
        turns = {name: partial(session.run, feed) for name, session in sessions.items()}
        wall, cpu = time_interleaved(turns, rounds)
        taken[about] = {
            name: {
                "wall_p50_ms": round(float(np.median(wall[name])) * 1e3, 3),
                "cpu_p50_ms": round(float(np.median(cpu[name])) * 1e3, 3),
                "ratio_to_fp32": ratio(wall[name] / wall["fp32"]),
                "n": rounds,
            }
            for name in sessions
        }
        for name, figures in taken[about].items():
            found = figures["ratio_to_fp32"]
            print(
                f"{about:10} {name:34} {figures['wall_p50_ms']:8.2f} ms  "
                f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f}) of fp32"
            )
    for session in sessions.values():
        session.close()
    return taken


if __name__ == "__main__":
    main()
