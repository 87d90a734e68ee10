"""Weight-only quantization: size against fp16, error, fidelity and time, beside ONNX Runtime's own.

- trained: both encoders of the shapes CLIP, over methods, group sizes and zero points: cosine with
  float32 on the test split, and text-to-image recall@1. The only weights here that were trained.
- decoder: a GPT-2 of 124 million random parameters with heavy tails; cosine of the logits of the
  last token. ONNX Runtime's tools get its graph with Gemm as MatMul and the head untied, as they
  take no other.
- encoder: the image encoder of ViT-L/14, 304 million random parameters.

Sizes are those of all constants of a graph, over the same weights in fp16 (float32 by half). Random
weights tell size and time; their fidelity is weak evidence. GPTQ is calibrated on other inputs than
those it is measured on. --all runs every combination on the decoder too, and GPTQ on the encoder.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from record import argument_parser, record
from weight_only_subjects import Feed, Subject, decoder, encoder, trained

from mmedge.converters.passes.building import replace_value
from mmedge.converters.passes.matching import is_op, perm_of, producer
from mmedge.converters.passes.weight_only import Rounding, WeightOnlyLinears, moment_inputs
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.statistics import collect_moments
from mmedge.converters.weight_only import Bits
from mmedge.runtimes.session import Session, SessionOptions, open_session
from mmedge.specs import Float32Array

_ROUNDS = {"decoder": 30, "encoder": 7}
_GROUP_SIZES = (32, 64, 128)
_ROUNDINGS: tuple[Rounding, ...] = ("rtn", "hqq", "gptq")


@dataclass(frozen=True)
class Contestant:
    """One way to quantize.

    Attributes:
        tool: "mmedge", or "ort" for ONNX Runtime's MatMulNBitsQuantizer.
        rounding: Of mmedge; "rtn" or "hqq" of ONNX Runtime.
        group_size: Weights that share a scale.
        symmetric: Without zero points.
        bits: Of a weight.
        quarter: Whether as many layers as needed take 2 bits, for a quarter of the fp16 size.
        timed: Whether its time is measured.
    """

    tool: Literal["mmedge", "ort"]
    rounding: Rounding
    group_size: int
    symmetric: bool = True
    bits: Bits = 4
    quarter: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        sign = "symmetric" if self.symmetric else "zero points"
        less = ", some 2 bits" if self.quarter else ""
        return f"{self.tool} {self.rounding} int{self.bits} g{self.group_size} {sign}{less}"


@dataclass
class Measured:
    """A contestant's figures, and its answers to the held-out inputs."""

    figures: dict[str, Any]
    answers: Float32Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))


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
        if "decoder" in parts:
            results["decoder"] = _full_size("decoder", decoder(), _decoder(arguments.all), work)
        if "encoder" in parts:
            results["encoder"] = _full_size("encoder", encoder(), _encoder(arguments.all), work)
    record(arguments.output, results)


def _grid() -> Iterator[Contestant]:
    """Every method with every group size, with and without zero points, and the peers."""
    for group_size in _GROUP_SIZES:
        for symmetric in (True, False):
            for rounding in _ROUNDINGS:
                yield Contestant("mmedge", rounding, group_size, symmetric)
            yield Contestant("ort", "rtn", group_size, symmetric)
        yield Contestant("ort", "hqq", group_size, symmetric=False)


def _decoder(everything: bool) -> list[Contestant]:
    chosen = [
        Contestant("mmedge", "rtn", 32, timed=True),
        Contestant("mmedge", "rtn", 128, timed=True),
        Contestant("mmedge", "rtn", 128, symmetric=False),
        Contestant("mmedge", "rtn", 256),
        Contestant("mmedge", "rtn", 128, bits=8, timed=True),
        Contestant("ort", "rtn", 32, timed=True),
        Contestant("ort", "rtn", 128, timed=True),
        Contestant("ort", "rtn", 128, symmetric=False),
        Contestant("mmedge", "rtn", 128, quarter=True),
        Contestant("mmedge", "gptq", 128),
        Contestant("mmedge", "gptq", 128, quarter=True, timed=True),
    ]
    return list(dict.fromkeys([*chosen, *_grid()])) if everything else chosen


def _encoder(everything: bool) -> list[Contestant]:
    chosen = [
        Contestant("mmedge", "rtn", 32, timed=True),
        Contestant("mmedge", "rtn", 128, timed=True),
        Contestant("mmedge", "rtn", 128, symmetric=False),
        Contestant("mmedge", "rtn", 128, quarter=True, timed=True),
        Contestant("mmedge", "rtn", 128, bits=8, timed=True),
        Contestant("ort", "rtn", 32),
        Contestant("ort", "rtn", 128, timed=True),
        Contestant("ort", "rtn", 128, symmetric=False),
    ]
    more = [Contestant("mmedge", "gptq", 128), Contestant("mmedge", "hqq", 128, symmetric=False)]
    return [*chosen, *more] if everything else chosen


def _trained(work: Path) -> dict[str, Any]:
    """Quantize both encoders of the trained model in every way; recall of both together."""
    pair = trained()
    reference = [_answers(subject.model, subject.held_out) for subject in pair]
    results: dict[str, Any] = {
        "samples": len(reference[0]),
        "recall_at_1_fp32": _recall(*reference),
        "contestants": {},
    }
    moments = [_moments(subject) for subject in pair]
    eight = Contestant("mmedge", "rtn", 32, bits=8)
    for contestant in (*_grid(), eight):
        sides: dict[str, Any] = {}
        answers = []
        for subject, expected, moment in zip(pair, reference, moments, strict=True):
            measured = _measure(contestant, subject, expected, moment, work / "few.onnx")
            answers.append(measured.answers)
            sides[subject.name.split()[1]] = measured.figures
        sides["recall_at_1"] = _recall(*answers)
        results["contestants"][contestant.name] = sides
        figures = "  ".join(
            f"{side} {sides[side]['size_to_fp16']:.3f} {sides[side]['cosine_mean']:.5f}"
            for side in ("image", "text")
        )
        print(f"trained  {contestant.name:44} {figures}  R@1 {sides['recall_at_1']:.3f}")
    print(f"trained  {'fp32':44} R@1 {results['recall_at_1_fp32']:.3f}")
    return results


def _full_size(
    part: str, subject: Subject, contestants: Sequence[Contestant], work: Path
) -> dict[str, Any]:
    expected = _answers(subject.model, subject.held_out)
    calibrated = any(contestant.rounding == "gptq" for contestant in contestants)
    moments = _moments(subject) if calibrated else {}
    results: dict[str, Any] = {"samples": len(expected), "contestants": {}}
    timed = {"fp32": subject.model}
    for index, contestant in enumerate(contestants):
        out = work / f"{part}-{index}.onnx"
        figures = _measure(contestant, subject, expected, moments, out).figures
        results["contestants"][contestant.name] = figures
        error = figures["weight_error_mean"]
        print(
            f"{part}  {contestant.name:44} {figures['size_to_fp16']:.4f} of fp16  "
            f"weights {'     ' if error is None else f'{error:.3f}'}  cosine mean "
            f"{figures['cosine_mean']:.5f} min {figures['cosine_min']:.5f}  same largest "
            f"{figures['same_largest']:.2f}  made in {figures['made_in_s']:.0f} s",
            flush=True,
        )
        if contestant.timed:
            timed[contestant.name] = out
        else:
            out.unlink()
            out.with_name(f"{out.name}.data").unlink()
    results["times"] = _times(timed, subject.timed, _ROUNDS[part])
    return results


def _measure(
    contestant: Contestant,
    subject: Subject,
    expected: Float32Array,
    moments: Mapping[str, Float32Array],
    out: Path,
) -> Measured:
    started = time.monotonic()
    figures: dict[str, Any] = {}
    if contestant.tool == "ort":
        _quantize_with_onnxruntime(contestant, subject.model, out)
        figures["weight_error_mean"] = None
    else:
        figures.update(_quantize(contestant, subject.model, moments, out))
    figures["made_in_s"] = time.monotonic() - started
    figures["size_bytes"] = _constant_bytes(ir.load(out))
    figures["size_to_fp16"] = figures["size_bytes"] / _half_bytes(ir.load(subject.model))
    answers = _answers(out, subject.held_out)
    norms = np.linalg.norm(answers, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (answers * expected).sum(axis=1) / norms
    figures["cosine_mean"] = float(cosines.mean())
    figures["cosine_min"] = float(cosines.min())
    figures["same_largest"] = float((answers.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return Measured(figures, answers)


def _quantize(
    contestant: Contestant, source: Path, moments: Mapping[str, Float32Array], out: Path
) -> dict[str, Any]:
    bits_of: dict[str, Bits] = {}
    if contestant.quarter:
        bits_of = _two_bits(contestant, source)
    model = ir.load(source)
    step = _step(contestant, moments, bits_of)
    step(model)
    ir.save(model, out, external_data=f"{out.name}.data", size_threshold_bytes=1024)
    errors = [weight.weight_error for weight in step.weights if weight.weight_error is not None]
    return {
        "weight_error_mean": statistics.fmean(errors),
        "left_in_float": [weight.name for weight in step.weights if weight.reason],
        "two_bit_layers": len(bits_of),
    }


def _step(
    contestant: Contestant, moments: Mapping[str, Float32Array], bits_of: Mapping[str, Bits]
) -> WeightOnlyLinears:
    return WeightOnlyLinears(
        "operators",
        bits=contestant.bits,
        group_size=contestant.group_size,
        symmetric=contestant.symmetric,
        rounding=contestant.rounding,
        moments=moments,
        bits_of=bits_of,
    )


def _two_bits(contestant: Contestant, source: Path) -> dict[str, Bits]:
    """Choose layers for 2 bits until the whole is a quarter of fp16: those that 4 bits hurt least.

    Four bits a weight are a quarter already, so scales and all that stays in float must be earned.
    """
    model = ir.load(source)
    budget = _half_bytes(model) / 4
    plain = Contestant("mmedge", "rtn", contestant.group_size, contestant.symmetric)
    step = _step(plain, {}, {})
    step(model)
    excess = _constant_bytes(model) - budget
    chosen: dict[str, Bits] = {}
    layers = [w for w in step.weights if w.op_type != "Gather" and w.weight_error and w.bits == 4]
    head = max(layers, key=lambda weight: weight.size_bytes)
    for weight in sorted(layers, key=lambda weight: weight.weight_error or 0.0):
        if excess <= 0:
            break
        if weight is not head:
            chosen[weight.name] = 2
            excess -= weight.shape[0] * weight.shape[1] / 4
    return chosen


def _quantize_with_onnxruntime(contestant: Contestant, source: Path, out: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        HQQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    model = ir.load(source)
    _as_products(model)
    proto = ir.to_proto(model)
    onnx.load_external_data_for_model(proto, str(source.parent))
    kinds = ("MatMul", "Gather")
    if contestant.rounding == "hqq":
        config = HQQWeightOnlyQuantConfig(
            block_size=contestant.group_size, bits=4, op_types_to_quantize=("MatMul",)
        )
    else:
        config = DefaultWeightOnlyQuantConfig(
            block_size=contestant.group_size,
            is_symmetric=contestant.symmetric,
            accuracy_level=4,
            op_types_to_quantize=kinds,
        )
    quantizer = MatMulNBitsQuantizer(
        proto,
        block_size=contestant.group_size,
        is_symmetric=contestant.symmetric,
        accuracy_level=4,
        op_types_to_quantize=kinds,
        algo_config=config,
    )
    quantizer.process()
    onnx.save(
        quantizer.model.model,
        out,
        save_as_external_data=True,
        location=f"{out.name}.data",
        size_threshold=1024,
    )


def _as_products(model: ir.Model) -> None:
    """Write every Gemm as MatMul and Add, and transposed constants as constants."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        turned = None
        if is_op(node, "Gemm") and weight is not None and weight.const_value is not None:
            flipped = node.attributes.get("transB")
            array = weight.const_value.numpy()
            turned = array.T if flipped is not None and flipped.as_int() else array
        elif is_op(node, "MatMul") and (turn := producer(weight, "Transpose")) is not None:
            table = turn.inputs[0]
            if table is not None and table.const_value is not None and perm_of(turn) == (1, 0):
                turned = table.const_value.numpy().T
        if turned is None or weight is None:
            continue
        constant = ir.Value(
            name=f"{node.outputs[0].name}_matrix",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(turned.shape),
            const_value=ir.tensor(np.ascontiguousarray(turned)),
        )
        graph.register_initializer(constant)
        made = ir.node("MatMul", [node.inputs[0], constant], name=f"{node.name}_product")
        made.outputs[0].name = f"{node.outputs[0].name}_product"
        graph.insert_before(node, made)
        result = made.outputs[0]
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
            add = ir.node("Add", [result, node.inputs[2]], name=f"{node.name}_bias")
            add.outputs[0].name = f"{node.outputs[0].name}_bias"
            graph.insert_before(node, add)
            result = add.outputs[0]
        replace_value(node.outputs[0], result)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _constant_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def _half_bytes(model: ir.Model) -> float:
    """Return the bytes of a float32 graph's constants with every float as fp16."""
    return sum(
        value.const_value.nbytes / (2 if value.dtype == ir.DataType.FLOAT else 1)
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def _moments(subject: Subject) -> dict[str, Float32Array]:
    names = moment_inputs(ir.load(subject.model))
    return collect_moments(subject.model, names, lambda: iter(subject.calibration))


def _open(model: Path) -> Session:
    return open_session(model, options=SessionOptions(threads=1))


def _answers(model: Path, feeds: Sequence[Feed]) -> Float32Array:
    with _open(model) as session:
        output = session.outputs[0].name
        rows = [session.run(feed)[output][0] for feed in feeds]
    answers: Float32Array = np.stack(rows)
    return answers


def _recall(images: Float32Array, texts: Float32Array) -> float:
    return float(((texts @ images.T).argmax(axis=1) == np.arange(len(texts))).mean())


def _times(models: Mapping[str, Path], feeds: Mapping[str, Feed], rounds: int) -> dict[str, Any]:
    """Let all take turns; return median CPU time of each, and its ratio to float32."""
    sessions = {name: _open(model) for name, model in models.items()}
    taken: dict[str, dict[str, Any]] = {}
    for about, feed in feeds.items():
        samples: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(rounds + 2):
            for name, session in sessions.items():
                started = time.process_time()
                session.run(feed)
                if turn >= 2:
                    samples[name].append(1e3 * (time.process_time() - started))
        taken[about] = {
            name: {
                "cpu_p50_ms": statistics.median(times),
                "ratio_to_fp32": statistics.median(
                    mine / theirs for mine, theirs in zip(times, samples["fp32"], strict=True)
                ),
                "n": len(times),
            }
            for name, times in samples.items()
        }
        for name, figures in taken[about].items():
            print(
                f"{about:10} {name:44} {figures['cpu_p50_ms']:8.2f} ms  "
                f"{figures['ratio_to_fp32']:.2f} of fp32"
            )
    for session in sessions.values():
        session.close()
    return taken


if __name__ == "__main__":
    main()
