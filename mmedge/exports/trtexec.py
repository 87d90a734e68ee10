"""trtexec command lines that build and check an engine.

trtexec comes with TensorRT and JetPack, tensorrt_rtx with TensorRT for RTX. TensorRT 10 needs
`--stronglyTyped`; TensorRT 11, whose networks are always so, takes and ignores it; TensorRT for RTX
does without. `--noTF32`, as in engines that mmedge builds: with TF32, products of float32 have 10
bits of mantissa, and fp32 would miss its tolerance.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from mmedge.bundle.tensors import TensorEntry
from mmedge.exports.document import GraphVectors, TrtexecLines
from mmedge.specs import Axis, shape_of

__all__ = ["trtexec_lines"]

_WORKSPACE_MIB = 1024


def trtexec_lines(
    onnx: str,
    engine: str,
    inputs: Sequence[TensorEntry],
    axes: Mapping[str, Axis],
    vectors: GraphVectors,
) -> TrtexecLines:
    """Return the command lines for one graph, relative to the export folder.

    Args:
        onnx: POSIX path of the graph.
        engine: POSIX path of the engine that is to be built.
        inputs: Input specs.
        axes: Bounds of all dynamic axes.
        vectors: What the engine is checked by.
    """
    shapes = []
    if any(isinstance(axis, str) for entry in inputs for axis in entry.shape):
        for option in ("min", "opt", "max"):
            spelled = ",".join(
                f"{_name(entry.name)}:{_times(_sized(entry, axes, option))}" for entry in inputs
            )
            shapes.append(f"--{option}Shapes={spelled}")
    files = [f"--onnx={onnx}", f"--saveEngine={engine}"]
    memory = f"--memPoolSize=workspace:{_WORKSPACE_MIB}"
    check = [f"--loadEngine={engine}"]
    check.append(
        "--shapes=" + ",".join(f"{_name(v.name)}:{_times(v.shape)}" for v in vectors.inputs)
    )
    check.append("--loadInputs=" + ",".join(f"{_name(v.name)}:{v.file}" for v in vectors.inputs))
    check.append(f"--exportOutput={PurePosixPath(engine).with_suffix('.outputs.json')}")
    return TrtexecLines(
        build=shlex.join(["trtexec", *files, "--stronglyTyped", "--noTF32", *shapes, memory]),
        build_rtx=shlex.join(["tensorrt_rtx", *files, *shapes]),
        check=shlex.join(["trtexec", *check]),
    )


def _name(name: str) -> str:
    """Return an input's name for trtexec, quoted if it has a colon or comma."""
    return f"'{name}'" if set(name) & set(":, ") else name


def _sized(entry: TensorEntry, axes: Mapping[str, Axis], bound: str) -> Sequence[int]:
    return shape_of(entry.spec(), {name: getattr(axis, bound) for name, axis in axes.items()}) or ()


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"
