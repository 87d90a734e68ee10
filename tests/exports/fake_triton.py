"""A stand-in for Triton: it reads a model repository by the protocol's own schema and runs it.

What Triton's core checks when it loads a repository is checked here too: names, platforms, version
folders, files, and that the steps of an ensemble fit together in dtype and shape. ONNX models run
in ONNX Runtime, Python models in this process with a module in place of Triton's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format

from mmedge.specs import Array

MODEL_FILES = {
    "onnxruntime_onnx": "model.onnx",
    "tensorrt_plan": "model.plan",
    "python": "model.py",
}


def _schema() -> ModuleType:
    """Triton's compiled model_config.proto, without the rest of its client, which wants gRPC."""
    file = distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", str(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA: Any = _schema()
NUMPY = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_STRING": np.object_,
}


def parse_config(text: str) -> Any:
    """A config.pbtxt as a ModelConfig; an unknown field or enum is an error."""
    return text_format.Parse(text, SCHEMA.ModelConfig())


def type_name(tensor: Any) -> str:
    return str(SCHEMA.DataType.Name(tensor.data_type))


@dataclass
class Repository:
    """A model repository that was found to be in order.

    Attributes:
        path: Its folder.
        configs: The configuration of each model by name.
        batches: How many samples each run of a model had, by model, in order.
    """

    path: Path
    configs: dict[str, Any]
    batches: dict[str, list[int]] = field(default_factory=dict)

    def infer(self, model: str, **inputs: Array) -> dict[str, Array]:
        """Return the response to one request; an error of the model is a RuntimeError."""
        config = self.configs[model]
        self._check_request(config, inputs)
        self.batches.setdefault(model, []).append(len(next(iter(inputs.values()))))
        if config.platform == "ensemble":
            tensors = dict(inputs)
            for step in config.ensemble_scheduling.step:
                feed = {
                    key: tensors[value] for key, value in step.input_map.items() if value in tensors
                }
                outputs = self.infer(step.model_name, **feed)
                tensors |= {value: outputs[key] for key, value in step.output_map.items()}
            return {output.name: tensors[output.name] for output in config.output}
        folder = self.path / model / "1"
        if config.backend == "python":
            with backend_utils() as utils:
                worker = load_worker(folder, config)
                (response,) = worker.execute([utils.Request(inputs)])
            if response.error is not None:
                raise RuntimeError(response.error.text)
            return {tensor.name: tensor.array for tensor in response.output_tensors}
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in config.output]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def _check_request(self, config: Any, inputs: Mapping[str, Array]) -> None:
        known = {tensor.name: tensor for tensor in config.input}
        assert set(inputs) <= set(known), config.name
        for name, tensor in known.items():
            assert name in inputs or tensor.optional, f"{config.name}: {name} is missing"
        for name, array in inputs.items():
            assert array.dtype == NUMPY[type_name(known[name])], (config.name, name)
            shape = array.shape[1:] if config.max_batch_size else array.shape
            assert fits(shape, known[name].dims), (config.name, name, array.shape)
            if config.max_batch_size:
                assert len(array) <= config.max_batch_size


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    return len(shape) == len(dims) and all(
        wanted in (-1, got) for got, wanted in zip(shape, dims, strict=True)
    )


def load_repository(path: Path) -> Repository:
    """Read and check a repository."""
    configs = {}
    for folder in sorted(path.iterdir()):
        if folder.is_dir():
            configs[folder.name] = parse_config((folder / "config.pbtxt").read_text("utf-8"))
            _check_model(folder, configs[folder.name])
    for config in configs.values():
        if config.platform == "ensemble":
            _check_ensemble(config, configs)
    return Repository(path, configs)


def _check_model(folder: Path, config: Any) -> None:
    assert config.name == folder.name
    assert bool(config.platform) != bool(config.backend)
    assert (folder / "1").is_dir()
    kind = config.platform or config.backend
    if kind == "ensemble":
        assert not config.instance_group  # the ensemble scheduler takes none
    else:
        assert (folder / "1" / MODEL_FILES[kind]).is_file()
    assert config.max_batch_size >= 0
    for tensor in (*config.input, *config.output):
        assert tensor.name
        assert tensor.data_type != SCHEMA.TYPE_INVALID
        assert all(dim == -1 or dim > 0 for dim in tensor.dims)
    for size in config.dynamic_batching.preferred_batch_size:
        assert 1 <= size <= config.max_batch_size
    for warmup in config.model_warmup:
        assert set(warmup.inputs) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            given = warmup.inputs[tensor.name]
            assert given.data_type == tensor.data_type
            assert fits(given.dims, tensor.dims)
            size = np.dtype(NUMPY[type_name(tensor)]).itemsize * math.prod(given.dims)
            assert (folder / "warmup" / given.input_data_file).stat().st_size == size


def _check_ensemble(config: Any, configs: Mapping[str, Any]) -> None:
    tensors = {tensor.name: tensor for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert model.max_batch_size == config.max_batch_size
        assert set(step.input_map) == {tensor.name for tensor in model.input}
        for tensor in model.input:
            _check_same(tensors[step.input_map[tensor.name]], tensor)
        for tensor in model.output:
            tensors[step.output_map[tensor.name]] = tensor
    for tensor in config.output:
        _check_same(tensors[tensor.name], tensor)


def _check_same(left: Any, right: Any) -> None:
    assert left.data_type == right.data_type
    assert list(left.dims) == list(right.dims)


def load_worker(folder: Path, config: Any) -> Any:
    """The TritonPythonModel of a folder's model.py, initialized as Triton does it."""
    spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    worker = module.TritonPythonModel()
    document = json_format.MessageToJson(config, preserving_proto_field_name=True)
    worker.initialize(
        {
            "model_config": document,
            "model_repository": str(folder.parent),
            "model_version": folder.name,
            "model_name": config.name,
        }
    )
    assert json.loads(document)["name"] == config.name
    return worker


@contextmanager
def backend_utils() -> Iterator[Any]:
    """Put a module in place of triton_python_backend_utils, which exists inside Triton alone."""
    utils: Any = ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name: str, array: Array) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> Array:
            return self.array

    class TritonError:
        def __init__(self, text: str) -> None:
            self.text = text

    class InferenceResponse:
        def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    class Request:
        def __init__(self, inputs: Mapping[str, Array]) -> None:
            self.inputs = {name: Tensor(name, array) for name, array in inputs.items()}

    utils.Tensor, utils.TritonError, utils.Request = Tensor, TritonError, Request
    utils.InferenceResponse = InferenceResponse
    utils.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    utils.triton_string_to_numpy = lambda name: NUMPY[name]
    sys.modules[utils.__name__] = utils
    try:
        yield utils
    finally:
        del sys.modules[utils.__name__]
