"""Overhead of encode_image over the bare session call, on a ready tensor at batch 1.

The bare call is ONNX Runtime's own `InferenceSession.run` of the very session that encode_image
calls: two sessions of one file differ by more than what is measured here. Full-size ViT-B/32 CLIP,
fp32 and int8, one thread, calls alternating; the overhead is the median over the rounds of the
difference within a round, beside the same difference of a graph so small that nothing but the
overhead is left of the call.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from full_size import bundle
from onnx import TensorProto, helper, save
from record import argument_parser, record

import mmedge
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.ort.session import OrtSession
from mmedge.runtimes.session import Session, SessionOptions


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    arguments = parser.parse_args()
    options = SessionOptions(threads=1)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    results: dict[str, Any] = {"rounds": arguments.rounds}
    for precision in ("fp32", "int8"):
        with mmedge.DualEncoder.load(
            bundle(),
            precision=precision,
            backend="onnxruntime",
            roles=["image_encoder"],
            options=options,
        ) as model:
            bare = native(model.sessions["image_encoder"])
            calls = {
                "bare": partial(bare.run, None, {"pixel_values": pixels}),
                "encode_image": partial(model.encode_image, pixels),
            }
            results[precision] = _compare(calls, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        tiny = _tiny_graph(Path(folder) / "tiny.onnx")
        small = np.ones((1, 4), np.float32)
        with open_session(tiny, options=options) as session:
            bare = native(session)
            calls = {
                "bare": partial(bare.run, None, {"x": small}),
                "session.run": partial(session.run, {"x": small}),
            }
            results["session_run_alone"] = _compare(calls, arguments.rounds * 20)
    for name, figures in results.items():
        if isinstance(figures, dict):
            print(
                f"{name:20} bare {figures['bare_p50_ms']:9.4f} ms, over it "
                f"{figures['overhead_p50_ms']:.4f} ms = {figures['overhead_share']:.3%}"
            )
    record(arguments.output, results)


def native(session: Session) -> Any:  # noqa: ANN401, onnxruntime is untyped
    """Return the engine's own session inside one of ours."""
    if not isinstance(session, OrtSession):
        raise TypeError(f"got {type(session).__name__}, expected OrtSession")
    return session._engine


def _tiny_graph(path: Path) -> Path:
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"
    ]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "tiny", tensors[:1], tensors[1:]
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _compare(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times = {name: np.empty(rounds) for name in calls}
    bare, other = calls
    for _ in range(3):
        for call in calls.values():
            call()
    for index in range(rounds):
        for name in (bare, other) if index % 2 else (other, bare):
            started = time.perf_counter()
            calls[name]()
            times[name][index] = time.perf_counter() - started
    bare_ms = float(np.median(times[bare])) * 1e3
    overhead_ms = float(np.median(times[other] - times[bare])) * 1e3
    return {
        "bare_p50_ms": round(bare_ms, 4),
        "overhead_p50_ms": round(overhead_ms, 4),
        "overhead_share": round(overhead_ms / bare_ms, 5),
    }


if __name__ == "__main__":
    main()
