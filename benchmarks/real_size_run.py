"""Opens one contestant of encoders_real_size.py, also in a process of its own for its memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["open_contestant", "print_peak"]

Array = npt.NDArray[np.generic]
Call = Callable[[Mapping[str, Array]], dict[str, Array]]


def open_contestant(engine: str, model: Path, threads: int) -> Call:
    """Return a function from a feed to outputs by name.

    Args:
        engine: See real_size_contestants.Contestant.
        model: Its file.
        threads: Of the engine.
    """
    if engine.startswith("mmedge"):
        from mmedge.runtimes.backends import open_session
        from mmedge.runtimes.session import SessionOptions

        session = open_session(
            model,
            backend_name="openvino" if engine == "mmedge-openvino" else "onnxruntime",
            options=SessionOptions(threads=threads),
        )
        return session.run
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        native = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in native.get_outputs()]
        return lambda feed: dict(zip(names, native.run(None, dict(feed)), strict=True))
    import openvino

    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # else the other contestants share one processor
            "INFERENCE_PRECISION_HINT": "f32",  # else it takes bf16 where the CPU has it
        },
    )
    request = compiled.create_infer_request()
    places = {output.get_any_name(): index for index, output in enumerate(compiled.outputs)}

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        request.infer(dict(feed), share_inputs=True)
        return {
            name: np.array(request.get_output_tensor(index).data) for name, index in places.items()
        }

    return run


def print_peak() -> None:
    """Open, run three times, print the peak resident memory in KiB.

    The command line is engine, model, threads and a file of the feed.
    """
    engine, model, threads, feed = sys.argv[1:]
    call = open_contestant(engine, Path(model), int(threads))
    with np.load(feed) as arrays:
        for _ in range(3):
            call({name: arrays[name] for name in arrays.files})
    status = Path("/proc/self/status").read_text("utf-8")
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
