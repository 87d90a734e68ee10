"""The building half of TensorRT as it is on machines that are not at hand: 10.x and 11.x.

A `FakeBuilderLibrary` stands for the module `tensorrt`. It parses nothing: its network is two
tensors and the layers that it is given. What `build_engine` asked of it is written down, and each
step can be made to fail the way that the library fails.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ERROR, WARNING, VERBOSE = 1, 2, 4


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    BF16 = 3


class BuilderFlag(enum.Enum):
    TF32 = 0
    REFIT = 1
    WEIGHT_STREAMING = 2
    STRIP_PLAN = 3
    REFIT_IDENTICAL = 4


class OldBuilderFlag(enum.Enum):
    """Of a library that streams no weights."""

    TF32 = 0


class CreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0  # of 10.x
    STRONGLY_TYPED = 1


class NewCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0  # ignored by 11.x


class Logger:
    def __init__(self) -> None: ...


class ProgressMonitor:
    def __init__(self) -> None: ...


@dataclass
class Tensor:
    name: str
    dtype: DataType
    shape: tuple[int, ...]
    is_shape_tensor: bool = False


@dataclass
class Layer:
    """A layer of a network: kind is a name of LayerType."""

    name: str
    kind: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.kind)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class Network:
    def __init__(self, library: FakeBuilderLibrary) -> None:
        self.inputs = [library.input]
        self.outputs = [library.output]
        self.layers = list(library.layers)
        self.num_inputs, self.num_outputs = 1, 1
        self.num_layers = len(self.layers)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class TimingCache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob + b"+timed"


class Config:
    """What a build was asked for."""

    progress_monitor: Any
    profiling_verbosity: Any

    def __init__(self, library: FakeBuilderLibrary) -> None:
        self._library = library
        self.flags: set[str] = {"TF32"}
        self.limits: dict[str, int] = {}
        self.profiles: list[dict[str, Any]] = []
        self.timing: TimingCache | None = None
        self.progress_monitor: Any = None
        self.profiling_verbosity: Any = None

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: enum.Enum) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.limits[pool] = limit

    def add_optimization_profile(self, profile: Profile) -> int:
        if self._library.refuses_profiles:
            self._library.say(ERROR, "IOptimizationProfile: please ensure MIN<=OPT<=MAX")
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, blob: bytes) -> TimingCache | None:
        return None if blob == b"damaged" else TimingCache(blob)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache.blob == b"of another GPU":
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        self.shapes[name] = (low, usual, high)


@dataclass
class ParserError:
    """What a parser says of a node; 10.x and 11.x name it, and its operator."""

    text: str
    name: str = ""
    operator: str = ""

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.name

    def node_operator(self) -> str:
        return self.operator

    def node(self) -> int:
        return 7


class Parser:
    def __init__(self, _network: Network, logger: Any) -> None:
        self._library: FakeBuilderLibrary = logger.library
        self.num_errors = len(self._library.parser_errors)

    def parse_from_file(self, path: str) -> bool:
        self._library.parsed.append(Path(path))
        return not self._library.parser_errors and self._library.parses

    def get_error(self, index: int) -> ParserError:
        return self._library.parser_errors[index]


class Builder:
    def __init__(self, library: FakeBuilderLibrary) -> None:
        self._library = library

    def create_network(self, flags: int) -> Network:
        self._library.network_flags = flags
        return Network(self._library)

    def create_builder_config(self) -> Config:
        self._library.config = Config(self._library)
        return self._library.config

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, _network: Network, config: Config) -> bytes | None:
        library = self._library
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, library.steps)
        for step in range(library.steps):
            if not monitor.step_complete("Building engine", step):
                library.say(ERROR, "BuildCanceled (Build canceled by user)")
                return None
        monitor.phase_finish("Building engine")
        for severity, message in library.says:
            library.say(severity, message)
        return None if library.fails else b"plan of " + library.__version__.encode()


@dataclass
class _Inspector:
    text: str

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        return self.text


class FakeBuilderLibrary(ModuleType):
    """The module `tensorrt` of a version.

    Attributes:
        input: The network's input.
        output: Its output.
        layers: Its layers.
        has_gpu: Whether a builder can be made.
        parses: Whether the parser takes the file where it has no errors to tell.
        parser_errors: What the parser does not take.
        refuses_profiles: Whether no profile is taken.
        steps: Of a build.
        says: (severity, message) at the end of a build.
        fails: Whether a build gives nothing.
        inspected: Layers in what the engine inspector says, None for an engine that does not load.
        parsed: Files that were parsed.
        network_flags: That the last network was made with.
        config: Of the last build.
    """

    LayerInformationFormat = SimpleNamespace(JSON="json")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    IProgressMonitor = ProgressMonitor
    OnnxParser = Parser

    def __init__(self, version: str = "10.3.0", name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__version__ = version
        newer = int(version.split(".", maxsplit=1)[0]) >= 11
        self.NetworkDefinitionCreationFlag = NewCreationFlag if newer else CreationFlag
        self.BuilderFlag: type[enum.Enum] = BuilderFlag
        self._logger: Any = None
        library = self

        class ILogger(Logger):
            def __init__(self) -> None:
                self.library = library
                library._logger = self

        self.ILogger = ILogger
        self.input = Tensor("x", DataType.FLOAT, (-1, 16))
        self.output = Tensor("y", DataType.FLOAT, (-1, 8))
        self.layers: list[Layer] = []
        self.has_gpu = self.parses = True
        self.parser_errors: list[ParserError] = []
        self.refuses_profiles = self.fails = False
        self.steps = 3
        self.says: list[tuple[int, str]] = []
        self.inspected: list[dict[str, Any]] | None = []
        self.parsed: list[Path] = []
        self.network_flags = -1
        self.config: Config = Config(self)

    def say(self, severity: int, message: str) -> None:
        self._logger.log(severity, message)

    def Builder(self, _logger: Any) -> Builder:  # noqa: N802
        if not self.has_gpu:
            self.say(ERROR, "CUDA initialization failure with error: 100")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Builder(self)

    def Runtime(self, _logger: Any) -> SimpleNamespace:  # noqa: N802
        told = None if self.inspected is None else json.dumps({"Layers": self.inspected})
        engine = SimpleNamespace(create_engine_inspector=lambda: _Inspector(told or ""))
        return SimpleNamespace(deserialize_cuda_engine=lambda _: None if told is None else engine)


def quantized_layers(dtype: DataType = DataType.INT8) -> list[Layer]:
    """A product whose weight is a constant in codes, behind a DequantizeLinear and a reshape."""
    codes = Tensor("codes", dtype, (16, 8))
    weight, moved = (Tensor(name, DataType.FLOAT, (16, 8)) for name in ("weight", "moved"))
    x, y = Tensor("x", DataType.FLOAT, (-1, 16)), Tensor("y", DataType.FLOAT, (-1, 8))
    return [
        Layer("codes", "CONSTANT", [], [codes]),
        Layer("dequantize", "DEQUANTIZE", [codes], [weight]),
        Layer("reshape", "SHUFFLE", [weight], [moved]),
        Layer("product", "MATRIX_MULTIPLY", [x, moved], [y]),
    ]
