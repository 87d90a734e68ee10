"""Engine types: request, cache key, layers, build result.

An engine is a graph compiled ahead for one version of a library and one kind of device. It is never
the artefact: it is built from an ONNX file and can be built again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmedge.errors import InputError
from mmedge.specs import Axis, TensorSpec

__all__ = [
    "ANY",
    "QUANTIZED_DTYPES",
    "BuildHost",
    "BuildSettings",
    "BuiltEngine",
    "EngineKey",
    "EngineLayer",
    "EngineRequest",
    "ShapeProfile",
    "ShapeRange",
    "count_precisions",
]

ANY = "any"
"""Instead of compute capabilities: every GPU from 8.0 on that the library supports."""

QUANTIZED_DTYPES = ("fp4", "int4", "int8", "fp8")
"""dtypes produced only by quantization, narrowest first."""


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Shapes of one input in an optimization profile: min, opt, max.

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
    """Build flags; the precision is set by the graph.

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
    """What to build, independent of the build machine.

    Attributes:
        backend: That builds it, by its name in BACKENDS.
        compute_capabilities: GPUs it is to run on, such as ("8.9", "12.0"); ("any",) for every GPU
            from 8.0 on that the library knows and that can compute what the graph asks for (7.5
            has to be named); empty for the GPU of this machine.
        profiles: One or more, tried in order at run time.
        settings: Flags.
    """

    backend: str
    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[ShapeProfile, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


@dataclass(frozen=True, slots=True)
class BuildHost:
    """Local builder, and the GPU that it builds for.

    Attributes:
        version: Of the library, such as "10.3.0.26".
        cuda: Version of the CUDA runtime; "" where no GPU of this machine is built for.
        driver: Version of the driver, likewise.
        compute_capability: Of the GPU, likewise.
    """

    version: str
    cuda: str = ""
    driver: str = ""
    compute_capability: str = ""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that an engine depends on; equal keys share an engine.

    Attributes:
        model_sha256: Over the ONNX file and its external data.
        request: What was requested.
        version: Of the library, such as "10.3.0.26".
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
    """One layer of a built engine, as reported by the library.

    Attributes:
        name: Of the layer; fused layers join the names of their nodes.
        kind: Its type.
        inputs: dtype of each input, such as "int8", "fp16", "fp32".
        outputs: dtype of each output.
        tactic: The kernel's name, "" if unknown.
        constants: dtype of each constant that it holds, its weights among them.
        nodes: Names of the ONNX nodes that it was made of, as far as they are known.
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
        """Compute dtype: quantized values if it reads any, else its first other output dtype.

        A layer that only quantizes computes in floats. "" if it touches no tensor.
        """
        read = (*self.constants, *self.inputs)
        for dtype in QUANTIZED_DTYPES:
            if dtype in read:
                return dtype
        floats = (*self.outputs, *self.inputs, *self.constants)
        made = (dtype for dtype in floats if dtype not in QUANTIZED_DTYPES)
        return next(made, "")


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A plan, and facts about it known without deserializing it.

    Attributes:
        plan: The serialized engine.
        inputs: Specs, read from the network when it was built.
        outputs: Specs.
        layers: What it is made of; empty if the library reports none.
        duration_s: Wall time of the build.
        warnings: What the library warned of.
    """

    plan: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[EngineLayer, ...]
    duration_s: float
    warnings: tuple[str, ...] = ()


def count_precisions(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """Return the number of layers in each precision, most frequent first.

    Layers that touch no tensor, such as the arithmetic of shapes, are left out.
    """
    counts = Counter(layer.precision for layer in layers if layer.precision)
    return dict(counts.most_common())
