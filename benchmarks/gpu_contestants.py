"""Contestants of gpu.py: torch, bare TensorRT, mmedge's sessions, ONNX Runtime.

Each contestant is a call that returns when its output is ready, on inputs on the device unless
its name has "host".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.runtimes.backends import open_session
from mmedge.runtimes.cuda.arrays import DeviceArray
from mmedge.runtimes.cuda.runtime import Device, DeviceMemory
from mmedge.runtimes.cuda.streams import Stream
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.session import EngineOptions, SessionOptions
from mmedge.runtimes.trt.session import TrtSession
from mmedge.specs import Array, Axis, TensorSpec

__all__ = ["Call", "Subject", "onnxruntime_calls", "tensorrt_calls", "torch_calls"]

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Subject:
    """One graph at one batch.

    Attributes:
        role: "image_encoder" or "text_encoder".
        source: The transformers folder.
        models: ONNX files of the portable layout, by precision.
        feed: Inputs on the host.
        axes: Bounds of the dynamic axes that engines are built for.
    """

    role: str
    source: Path
    models: Mapping[str, Path]
    feed: Mapping[str, Array]
    axes: Mapping[str, Axis]

    def feed_of(self, inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
        """Return the inputs in the dtypes that a graph takes."""
        return {spec.name: self.feed[spec.name].astype(spec.dtype) for spec in inputs}


def torch_calls(subject: Subject) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield makers of torch's calls in fp16: eager, compiled, compiled with CUDA graphs."""

    def made(mode: str | None) -> Call:
        import torch
        from transformers import CLIPModel

        if not torch.cuda.is_available():
            raise RuntimeError("the installed torch has no CUDA")
        model = CLIPModel.from_pretrained(subject.source, dtype=torch.float16).cuda().eval()
        feed = {name: torch.as_tensor(array).cuda() for name, array in subject.feed.items()}
        if subject.role == "image_encoder":
            (pixels,) = feed.values()
            run: Any = lambda: model.get_image_features(pixels.half())  # noqa: E731
        else:
            (ids,) = feed.values()
            run = lambda: model.get_text_features(ids)  # noqa: E731
        if mode is not None:
            run = torch.compile(run, mode=mode)

        def call() -> None:
            with torch.inference_mode():
                run()
            torch.cuda.synchronize()

        return call

    yield "torch fp16 eager", lambda: made(None)
    yield "torch fp16 compiled", lambda: made("default")
    yield "torch fp16 compiled, CUDA graphs", lambda: made("reduce-overhead")


def tensorrt_calls(
    subject: Subject, backend: str, precision: str, stack: ExitStack
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield makers of TensorRT's calls: bare, and through mmedge, with and without CUDA graphs."""
    name = f"{backend} {precision}"

    def opened(graphs: int) -> TrtSession:
        options = SessionOptions(
            device="cuda", axes=subject.axes, engine=EngineOptions(graphs=graphs)
        )
        model = subject.models[precision]
        session = open_session(model, backend_name=backend, options=options)
        if not isinstance(session, TrtSession):
            raise TypeError(f"got {type(session).__name__}, expected TrtSession")
        return stack.enter_context(session)

    def bare(*, graph: bool) -> Call:
        return _bare(opened(0), subject, graph=graph)

    def on_device(graphs: int) -> Call:
        session = opened(graphs)
        held = {key: _on_device(array) for key, array in subject.feed_of(session.inputs).items()}
        return session.bind_device(held).run

    def host(graphs: int, *, bound: bool) -> Call:
        session = opened(graphs)
        feed = subject.feed_of(session.inputs)
        return session.bind(feed).run if bound else lambda: session.run(feed)

    yield f"{name} bare", lambda: bare(graph=False)
    yield f"{name} bare, CUDA graph", lambda: bare(graph=True)
    yield f"{name} mmedge, no graphs", lambda: on_device(0)
    yield f"{name} mmedge", lambda: on_device(8)
    yield f"{name} mmedge host, bound", lambda: host(8, bound=True)
    yield f"{name} mmedge host", lambda: host(8, bound=False)


def _on_device(array: Array) -> DeviceArray:
    return DeviceArray.of(np.ascontiguousarray(array), Device(0))


def _bare(session: TrtSession, subject: Subject, *, graph: bool) -> Call:
    """Return TensorRT's own enqueue and a wait, and nothing else; or a launch of it captured."""
    engine = session._engine
    if engine is None:
        raise RuntimeError("the session is closed")
    device, context = engine.device, engine.new_context()
    stream = Stream(device)
    feed = subject.feed_of(session.inputs)
    shapes = tuple(feed[tensor.spec.name].shape for tensor in engine.inputs)
    context.set_optimization_profile_async(engine.profile_for(shapes), stream.handle)
    held: list[DeviceMemory | DeviceArray] = []
    for tensor, shape in zip(engine.inputs, shapes, strict=True):
        array = _on_device(feed[tensor.spec.name])
        context.set_input_shape(tensor.spec.name, shape)
        context.set_tensor_address(tensor.spec.name, array.address)
        held.append(array)
    if context.infer_shapes():
        raise RuntimeError("shapes do not follow from the inputs")
    for tensor in engine.outputs:
        shape = tuple(context.get_tensor_shape(tensor.spec.name))
        size = int(np.prod(shape)) * tensor.spec.dtype.itemsize
        memory = device.allocate(size, "a benchmark's output")
        context.set_tensor_address(tensor.spec.name, memory.address)
        held.append(memory)
    scratch = device.allocate(max(engine.scratch_bytes, 1), "a benchmark's activations")
    context.set_device_memory(scratch.address, scratch.size_bytes)
    held.append(scratch)

    def enqueue() -> None:
        if not context.execute_async_v3(stream.handle):
            raise RuntimeError("TensorRT failed to run")

    enqueue()
    stream.synchronize()
    if graph:
        stream.begin_capture()
        enqueue()
        captured = stream.end_capture()

    def call(_: object = held) -> None:
        if graph:
            captured.launch(stream)
        else:
            enqueue()
        stream.synchronize()

    return call


def onnxruntime_calls(
    subject: Subject, precision: str, stack: ExitStack
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield makers of the CUDA provider's calls: through mmedge, IO binding, CUDA graphs."""
    name = f"onnxruntime {precision}"
    model = subject.models[precision]

    def through_mmedge() -> Call:
        session = open_session(model, options=SessionOptions(device="cuda"))
        stack.enter_context(session)
        feed = subject.feed_of(session.inputs)
        return lambda: session.run(feed)

    def bound(*, graphs: bool) -> Call:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        settings.graph_optimization_level = level
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1" if graphs else "0"})
        session = onnxruntime.InferenceSession(
            str(model), settings, providers=[provider], enable_fallback=0
        )
        if session.get_providers()[0] != provider[0]:
            raise RuntimeError("the CUDA provider does not start")
        binding = session.io_binding()
        feed = subject.feed_of(read_onnx_file(model).inputs)
        for key, array in feed.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            binding.bind_ortvalue_input(key, value)
        batch = len(next(iter(feed.values())))
        for output in session.get_outputs():
            shape = [batch, *output.shape[1:]]
            dtype = np.float16 if "16" in output.type else np.float32
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
            binding.bind_ortvalue_output(output.name, value)

        def call() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call

    yield f"{name} mmedge host", through_mmedge
    yield f"{name} IO binding", lambda: bound(graphs=False)
    yield f"{name} IO binding, CUDA graph", lambda: bound(graphs=True)
