"""The vocabulary of engines: what is asked for, what an engine depends on, what came of a build.

An engine is a serialized TensorRT plan. It is never the artefact: it is made from the ONNX file of
a variant's `portable` layout, for one flavour and version of TensorRT and one kind of GPU, and can
be made again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from mmedge.errors import InputError
from mmedge.specs import Axis, TensorSpec

__all__ = [
    "CODES",
    "FLAVOURS",
    "BuildSettings",
    "BuiltEngine",
    "EngineKey",
    "EngineLayer",
    "EngineRequest",
    "Flavour",
    "ShapeProfile",
    "ShapeRange",
    "device_index",
]

Flavour: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT of servers and JetPack, or TensorRT for RTX of desktop GPUs."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

CODES = ("fp4", "int4", "int8", "fp8")
"""dtypes that only quantization makes, the narrowest first."""


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes of one input that an optimization profile takes.

    Attributes:
        min: Smallest shape.
        opt: The shape that kernels are chosen for.
        max: Largest shape.

    Raises:
        InputError: If the ranks differ, or a size is not 0 <= min <= opt <= max and 1 <= max.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise InputError(
                f"Shape range: got {self.min}, {self.opt} and {self.max}, expected three shapes of "
                "one rank."
            )
        for sizes in zip(self.min, self.opt, self.max, strict=True):
            Axis(*sizes)


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """An optimization profile: a range of shapes for every input.

    Attributes:
        ranges: By input name; every input of the graph, the fixed ones with one shape three times.
    """

    ranges: Mapping[str, ShapeRange]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Flags of a build; the precision is not among them, it stands in the graph.

    Attributes:
        workspace_bytes: The most device memory that a kernel may use for scratch; without a GPU
            the library would otherwise assume 64 GiB.
        weight_streaming: Weights may stay in host memory and be streamed in.
        stripped: Leave the weights out of the plan; they are put in from the ONNX file each time
            the engine is loaded. Needs a GPU to build.
        refittable: Weights can be exchanged for others after the build. Needs a GPU to build.
    """

    workspace_bytes: int = 1 << 30
    weight_streaming: bool = False
    stripped: bool = False
    refittable: bool = False


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What is to be built, whatever machine it is built on.

    Attributes:
        flavour: Of TensorRT.
        compute_capabilities: What it is to run on, such as ("8.9", "12.0"); ("any",) for every GPU
            from 8.0 on that TensorRT-RTX knows and that can compute what the graph asks for (7.5
            has to be named); empty for the GPU of this machine.
        profiles: One or more, tried in order at run time.
        settings: Flags.
    """

    flavour: Flavour
    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[ShapeProfile, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that an engine depends on; two equal keys may share one.

    Attributes:
        model_sha256: Over the ONNX file and its external data.
        request: What was asked for.
        version: Of the TensorRT library, such as "10.3.0.26".
        cuda: Version of the CUDA runtime, "" where the engine does not depend on it.
        driver: Version of the driver, "" where there is none (a build without a GPU).
        compute_capability: Of the GPU it runs on, or the portability class: "8.9+12.0", "any".
    """

    model_sha256: str
    request: EngineRequest
    version: str
    cuda: str
    driver: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of a built engine, as the library tells it.

    Attributes:
        name: Of the layer; fused layers join the names of their nodes.
        kind: Its type.
        inputs: dtype of each input, such as "int8", "fp16", "fp32".
        outputs: dtype of each output.
        tactic: The kernel's name, "" where it is not told.
        constants: dtype of each constant that it holds, its weights among them.
        nodes: Names of the ONNX nodes that it was made of, as far as they are told.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str = ""
    constants: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """What it computes in: codes if it reads any, else the first other dtype that it makes.

        A layer that only makes codes, from floats, computes in floats. "" if it touches no tensor.
        """
        read = (*self.constants, *self.inputs)
        for code in CODES:
            if code in read:
                return code
        floats = (*self.outputs, *self.inputs, *self.constants)
        made = (dtype for dtype in floats if dtype not in CODES)
        return next(made, "")


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A plan, and what is known of it without deserializing it.

    Attributes:
        plan: The serialized engine.
        inputs: Specs, read from the network when it was built.
        outputs: Specs.
        layers: What it is made of; empty where the library told nothing.
        duration_s: Wall time of the build.
        warnings: What the library warned of.
    """

    plan: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[EngineLayer, ...]
    duration_s: float
    warnings: tuple[str, ...] = ()


def device_index(device: str) -> int | None:
    """Return the number in "cuda" or "cuda:N"; None for what is no CUDA device."""
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    return None if match is None else int(match.group(1) or 0)
