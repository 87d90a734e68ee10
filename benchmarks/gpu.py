"""CLIP ViT-B/32 on this GPU: parity on the golden vectors, latency, throughput, overhead.

Needs an NVIDIA GPU and measures with what is installed beside it: TensorRT, TensorRT-RTX, ONNX
Runtime with CUDA, torch with CUDA. Missing or failing backends are recorded with their
reason, such as TensorRT-RTX on a GPU that is not one of its targets.

- parity: every variant's golden vectors, replayed in every backend;
- latency: each contestant alone, after a warm-up; median and 99th percentile, samples a second from
  the median. Inputs are on the device, except where a name says "host";
- overhead: mmedge's bound run and the bare enqueue (with CUDA graphs, and without), alternating;
  the ratio is the median over the rounds, with a bootstrap interval of 95 %. It is to be below 1.02
  with graphs;
- the precisions against fp16, alternating: one that is not faster is not worth using here.

    python benchmarks/gpu.py

Where a GPU is there for a while only, `--minutes 8` begins nothing new after that time and writes
"no time was left" for what it did not reach; batches come in the order in which they are named. The
file is written anew after every batch, so that an interrupted run keeps its results.

Without a GPU it prints a message and measures nothing.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_contestants import Call, Subject, onnxruntime_calls, tensorrt_calls, torch_calls
from interleaved import ratio, time_interleaved
from record import argument_parser, record

from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import BackendError, MmedgeError
from mmedge.machine.report import look_at_machine
from mmedge.models import verify_bundle
from mmedge.runtimes.backends import backend
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Axis

_ENGINES = ("tensorrt", "tensorrt-rtx")
_PRECISIONS = ("fp32", "fp16", "int8", "fp8")
_BATCHES = (1, 8, 64)
_WARMUP_S = 0.5
_LEAST_CALLS, _MOST_CALLS = 200, 2000
_ROUNDS = 300
_NO_TIME = {"outcome": "no time was left"}


@dataclass(frozen=True, slots=True)
class Clock:
    """Duration of the measurements.

    Attributes:
        seconds: For each contestant.
        until: Of time.monotonic(), after which nothing new is begun.
    """

    seconds: float
    until: float = math.inf

    def is_over(self) -> bool:
        """Return whether no time is left."""
        return time.monotonic() >= self.until


def main() -> None:
    """Measure the available backends, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for a contestant; default: 1")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all of it")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=_BATCHES, help="default: 1 8 64", metavar="N"
    )
    parser.add_argument("--require", action="store_true", help="fail without a GPU")
    arguments = parser.parse_args()
    clock = Clock(arguments.seconds, time.monotonic() + 60 * arguments.minutes)
    try:
        device = Device(0)
    except BackendError as error:
        print(f"gpu: no GPU can be used here, so nothing is measured. {error}")
        sys.exit(1 if arguments.require else 0)
    print(f"gpu: {device.properties}")
    from full_size import bundle, source  # imports torch

    opened = open_bundle(bundle(precisions=_PRECISIONS, target="tensorrt"))
    results: dict[str, Any] = {
        "complete": False,
        "gpu": asdict(device.properties),
        "cuda": asdict(look_at_machine().cuda),
        "installed": {name: backend(name).engine_version() for name in ("onnxruntime", *_ENGINES)},
        "parity": _parity(opened, clock),
    }
    record(arguments.output, results)
    largest = max(arguments.batches)
    for batch in arguments.batches:
        for role in opened.manifest.roles:
            print(f"== {role}, batch {batch}")
            subject = _subject(opened, role, batch, largest, source())
            name = f"{role}_batch_{batch}"
            results[name] = _measure(subject, batch, clock)
            print(name, results[name])
            record(arguments.output, results)
    results["complete"] = not clock.is_over()
    record(arguments.output, results)


def _models(opened: Bundle, role: str) -> dict[str, Path]:
    """Return the portable graph of each precision."""
    return {
        variant.precision.value: opened.model_path(variant, layouts=("portable",))
        for variant in opened.role(role).variants
        if "portable" in variant.models
    }


def _subject(opened: Bundle, role: str, batch: int, largest: int, source: Path) -> Subject:
    """Return a role at a batch: what its golden vectors were made from, as often as needed."""
    made_from = opened.golden().inputs[role]
    feed = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in made_from.items()}
    (entry, *_) = opened.role(role).inputs
    axes = {"batch": Axis(1, batch, largest)}
    if "sequence" in entry.shape:
        length = feed[entry.name].shape[entry.shape.index("sequence")]
        axes["sequence"] = Axis(1, length, max(length, 77))
    return Subject(role, source, _models(opened, role), feed, axes)


def _parity(opened: Bundle, clock: Clock) -> list[dict[str, Any]]:
    """Replay the golden vectors of every variant in every backend."""
    rows: list[dict[str, Any]] = []
    for name in ("onnxruntime", *_ENGINES):
        for precision in _PRECISIONS:
            replayed = [_NO_TIME] if clock.is_over() else _replayed(opened, name, precision)
            for row in replayed:
                rows.append({"backend": name, "precision": precision} | row)
                print(rows[-1])
    return rows


def _replayed(opened: Bundle, name: str, precision: str) -> list[dict[str, Any]]:
    try:
        found = verify_bundle(opened, device="cuda", precision=precision, backend=name)
    except Exception as error:  # noqa: BLE001, the other backends are to have their turn
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


def _measure(subject: Subject, batch: int, clock: Clock) -> dict[str, Any]:
    """Return latencies of all contestants, what mmedge adds, and the precisions compared."""
    found: dict[str, Any] = {"latency": {}}
    for name in _ENGINES:
        if backend(name).engine_version() is None:
            found["latency"][name] = {"outcome": "not installed"}
            continue
        for precision in subject.models:
            found["latency"] |= _engine(subject, name, precision, batch, clock)
        found[f"{name}_overhead"] = _NO_TIME if clock.is_over() else _overhead(subject, name)
        found[f"{name}_against_fp16"] = (
            _NO_TIME if clock.is_over() else _against_fp16(subject, name)
        )
    for precision in subject.models:
        with ExitStack() as stack:
            for name, make in onnxruntime_calls(subject, precision, stack):
                found["latency"][name] = _alone(make, batch, clock)
    for name, make in torch_calls(subject):
        found["latency"][name] = _alone(make, batch, clock)
    return found


def _engine(
    subject: Subject, name: str, precision: str, batch: int, clock: Clock
) -> dict[str, Any]:
    """Build or find an engine, which may end the matter, and time its contestants."""
    if clock.is_over():
        return {f"{name} {precision}": _NO_TIME}
    options = SessionOptions(device="cuda", axes=subject.axes)
    begun = time.monotonic()
    try:
        backend(name).prepare(subject.models[precision], options)
    except Exception as error:  # noqa: BLE001, as above
        outcome = _outcome(error)
        print(f"{name} {precision}: {outcome}")
        return {f"{name} {precision}": {"outcome": outcome}}
    print(f"{name} {precision}: engine there after {time.monotonic() - begun:.0f} s")
    with ExitStack() as stack:
        calls = tensorrt_calls(subject, name, precision, stack)
        return {call: _alone(make, batch, clock) for call, make in calls}


def _alone(make: Callable[[], Call], batch: int, clock: Clock) -> dict[str, Any]:
    """Time one contestant alone; an error is its outcome."""
    if clock.is_over():
        return _NO_TIME
    try:
        call = make()
        warm = time.monotonic() + _WARMUP_S
        for _ in range(10):
            call()
        while time.monotonic() < warm:
            call()
        times: list[float] = []
        end = time.monotonic() + clock.seconds
        while len(times) < _LEAST_CALLS or (time.monotonic() < end and len(times) < _MOST_CALLS):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001, any error of a peer is its outcome
        return {"outcome": _outcome(error)}
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "latency_p50_ms": round(1e3 * float(p50), 4),
        "latency_p99_ms": round(1e3 * float(p99), 4),
        "throughput_per_s": round(batch / float(p50), 1),
        "calls": len(times),
    }


def _overhead(subject: Subject, name: str) -> dict[str, Any]:
    """Return mmedge's bound run over the bare enqueue, on the device, alternating."""
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
    """Return the time of each precision over that of fp16, alternating."""
    wanted = {f"{name} {precision} mmedge": precision for precision in subject.models}
    return _compared(subject, name, wanted, "fp16")


def _compared(subject: Subject, name: str, wanted: Mapping[str, str], first: str) -> dict[str, Any]:
    """Return the time of contestants over that of the first, alternating.

    Args:
        subject: What they run.
        name: Their backend.
        wanted: The contestants, and their names in the result.
        first: The reference, by its name in the result.
    """
    turns: dict[str, Call] = {}
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        for precision in subject.models:
            for call, make in tensorrt_calls(subject, name, precision, stack):
                if call not in wanted:
                    continue
                try:
                    turns[wanted[call]] = make()
                except Exception as error:  # noqa: BLE001, a failure does not stop the others
                    found[wanted[call]] = {"outcome": _outcome(error)}
        if first not in turns:
            return dict(found.get(first, {"outcome": f"there is no {first}"}))
        try:
            wall, _ = time_interleaved(turns, _ROUNDS)
        except Exception as error:  # noqa: BLE001, as _alone
            return {"outcome": _outcome(error)}
    return found | {key: ratio(times / wall[first]) for key, times in wall.items() if key != first}


def _outcome(error: Exception) -> str:
    """Return the outcome of an error; unexpected ones are printed with their traceback."""
    if not isinstance(error, MmedgeError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    main()
