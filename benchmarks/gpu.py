"""CLIP ViT-B/32 on this GPU: parity on the golden vectors, latency, throughput, overhead.

Needs an NVIDIA GPU and measures with what is installed beside it: TensorRT, TensorRT-RTX, ONNX
Runtime with CUDA, torch with CUDA. What is missing or refuses is written down with its reason; that
is how it is recorded what TensorRT-RTX says of a GPU that it does not name as a target.

- parity: every variant's golden vectors, replayed in every backend;
- latency: each contestant alone, after a warm-up; median and 99th percentile, samples a second from
  the median. Inputs lie on the device, except where a name says "host";
- overhead: mmedge's bound run and the bare enqueue (with CUDA graphs, and without) in turns; the
  ratio is the median over the rounds, with a bootstrap interval of 95 %. It is to be below 1.02
  with graphs;
- the precisions against fp16, in turns: one that does not beat it has no place on this GPU.

    python benchmarks/gpu.py

Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from gpu_contestants import Call, Subject, onnxruntime_calls, tensorrt_calls, torch_calls
from racing import race, ratio
from record import argument_parser, record

from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import BackendError, MmedgeError
from mmedge.models import verify_bundle
from mmedge.runtimes.machine import look_at_machine
from mmedge.runtimes.session import SessionOptions, backend
from mmedge.runtimes.trt.cuda import Device

_ENGINES = ("tensorrt", "tensorrt-rtx")
_PRECISIONS = ("fp32", "fp16", "int8", "fp8")
_BATCHES = (1, 8, 64)
_TOKENS = 16
_WARMUP_S = 1.0
_LEAST_CALLS, _MOST_CALLS = 200, 2000
_ROUNDS = 300


def main() -> None:
    """Measure what can be measured here, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="a contestant; default: 3")
    parser.add_argument(
        "--require", action="store_true", help="fail where there is no GPU, instead of saying so"
    )
    arguments = parser.parse_args()
    try:
        device = Device(0)
    except BackendError as error:
        print(f"gpu: no GPU can be used here, so nothing is measured. {error}")
        sys.exit(1 if arguments.require else 0)
    print(f"gpu: {device.properties}")
    from full_size import bundle, source  # imports torch

    opened = open_bundle(bundle(precisions=_PRECISIONS, target="tensorrt"))
    results: dict[str, Any] = {
        "gpu": asdict(device.properties),
        "cuda": asdict(look_at_machine().cuda),
        "installed": {name: backend(name).engine_version() for name in ("onnxruntime", *_ENGINES)},
        "parity": _parity(opened),
    }
    for role in opened.manifest.roles:
        for batch in _BATCHES:
            subject = _subject(opened, role, batch, source())
            print(f"== {role}, batch {batch}")
            results[f"{role}_batch_{batch}"] = _measure(subject, batch, arguments.seconds)
    record(arguments.output, results)
    for name in ("parity", *(key for key in results if "_batch_" in key)):
        print(name, results[name])


def _models(opened: Bundle, role: str) -> dict[str, Path]:
    """Return the portable graph of each precision."""
    return {
        variant.precision.value: opened.model_path(variant, layouts=("portable",))
        for variant in opened.role(role).variants
        if "portable" in variant.models
    }


def _subject(opened: Bundle, role: str, batch: int, source: Path) -> Subject:
    axes = {"batch": (1, batch, max(_BATCHES)), "sequence": (1, _TOKENS, 77)}
    random = np.random.default_rng(0)
    (entry, *_) = opened.role(role).inputs
    if role == "image_encoder":
        feed = random.standard_normal((batch, 3, 224, 224)).astype(np.float32)
    else:
        feed = random.integers(1, 400, (batch, _TOKENS)).astype(entry.dtype)
        feed[:, -1] = 49407  # the end, where CLIP's text encoder pools
    return Subject(role, source, _models(opened, role), {entry.name: feed}, axes)


def _parity(opened: Bundle) -> list[dict[str, Any]]:
    """Replay the golden vectors of every variant in every backend."""
    rows: list[dict[str, Any]] = []
    for name in ("onnxruntime", *_ENGINES):
        for precision in _PRECISIONS:
            for row in _replayed(opened, name, precision):
                rows.append({"backend": name, "precision": precision} | row)
                print(rows[-1])
    return rows


def _replayed(opened: Bundle, name: str, precision: str) -> list[dict[str, Any]]:
    try:
        found = verify_bundle(opened, device="cuda", precision=precision, backend=name)
    except MmedgeError as error:
        return [{"outcome": _outcome(error)}]
    return [
        {
            "role": each.role,
            "engine": each.placement.engine,
            "layers": dict(each.placement.providers),
            "cosine_min": each.cosine_min,
            "max_abs_error": each.max_abs_error,
            "passed": each.passed,
        }
        for each in found
    ]


def _measure(subject: Subject, batch: int, seconds: float) -> dict[str, Any]:
    """Return latencies of all contestants, what mmedge adds, and the precisions compared."""
    found: dict[str, Any] = {"latency": {}}
    for name, make in torch_calls(subject):
        found["latency"][name] = _alone(make, batch, seconds)
    for precision in subject.models:
        with ExitStack() as stack:
            for name, make in onnxruntime_calls(subject, precision, stack):
                found["latency"][name] = _alone(make, batch, seconds)
    for name in _ENGINES:
        if backend(name).engine_version() is None:
            found["latency"][name] = {"outcome": "not installed"}
            continue
        for precision in subject.models:
            found["latency"] |= _engine(subject, name, precision, batch, seconds)
        found[f"{name}_overhead"] = _overhead(subject, name)
        found[f"{name}_against_fp16"] = _against_fp16(subject, name)
    return found


def _engine(
    subject: Subject, name: str, precision: str, batch: int, seconds: float
) -> dict[str, Any]:
    """Build or find an engine, which may end the matter, and time its contestants."""
    options = SessionOptions(device="cuda", axes=subject.axes)
    begun = time.monotonic()
    try:
        backend(name).prepare(subject.models[precision], options)
    except MmedgeError as error:
        print(f"{name} {precision}: {_outcome(error)}")
        return {f"{name} {precision}": {"outcome": _outcome(error)}}
    print(f"{name} {precision}: engine there after {time.monotonic() - begun:.0f} s")
    with ExitStack() as stack:
        calls = tensorrt_calls(subject, name, precision, stack)
        return {call: _alone(make, batch, seconds) for call, make in calls}


def _alone(make: Callable[[], Call], batch: int, seconds: float) -> dict[str, Any]:
    """Time one contestant by itself; what it raises is its outcome."""
    try:
        call = make()
        warm = time.monotonic() + _WARMUP_S
        for _ in range(10):
            call()
        while time.monotonic() < warm:
            call()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < _LEAST_CALLS or (time.monotonic() < end and len(times) < _MOST_CALLS):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001, whatever a peer raises is what became of it
        return {"outcome": _outcome(error)}
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "latency_p50_ms": round(1e3 * float(p50), 4),
        "latency_p99_ms": round(1e3 * float(p99), 4),
        "throughput_per_s": round(batch / float(p50), 1),
        "calls": len(times),
    }


def _turns(
    subject: Subject, name: str, wanted: Mapping[str, str], stack: ExitStack
) -> Iterator[tuple[str, Call]]:
    """Yield some contestants of a backend, by what they are called here."""
    for precision in subject.models:
        for call, make in tensorrt_calls(subject, name, precision, stack):
            if call in wanted:
                yield wanted[call], make()


def _overhead(subject: Subject, name: str) -> dict[str, Any]:
    """Return mmedge's bound run over the bare enqueue, on the device, in turns."""
    precision = "fp16" if "fp16" in subject.models else next(iter(subject.models))
    prefix = f"{name} {precision}"
    with_graphs = {f"{prefix} bare, CUDA graph": "bare", f"{prefix} mmedge": "mmedge"}
    without = {f"{prefix} bare": "bare", f"{prefix} mmedge, no graphs": "mmedge"}
    return {
        "precision": precision,
        "with_graphs": _compared(subject, name, with_graphs, "bare"),
        "without_graphs": _compared(subject, name, without, "bare"),
    }


def _against_fp16(subject: Subject, name: str) -> dict[str, Any]:
    """Return the time of each precision over that of fp16, in turns."""
    wanted = {f"{name} {precision} mmedge": precision for precision in subject.models}
    return _compared(subject, name, wanted, "fp16")


def _compared(subject: Subject, name: str, wanted: Mapping[str, str], first: str) -> dict[str, Any]:
    """Return the time of contestants over that of the first, in turns."""
    try:
        with ExitStack() as stack:
            turns = dict(_turns(subject, name, wanted, stack))
            if first not in turns:
                return {"outcome": f"there is no {first}"}
            wall, _ = race(turns, _ROUNDS)
    except MmedgeError as error:
        return {"outcome": _outcome(error)}
    return {key: ratio(times / wall[first]) for key, times in wall.items() if key != first}


def _outcome(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    main()
