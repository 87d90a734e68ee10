"""Raw array files, for programs without an npy reader."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Role, Variant
from mmedge.exports.document import GraphVectors, VectorFile
from mmedge.exports.place import ExportFolder
from mmedge.specs import Array, Axis

__all__ = ["VECTORS", "write_graph_vectors", "write_raw"]

VECTORS = "vectors"
"""Folder of all raw files, relative to the document."""


def write_raw(folder: ExportFolder, relative: str, name: str, array: Array) -> VectorFile:
    """Write an array little-endian, row-major and without a header.

    Args:
        folder: Of the document.
        relative: POSIX path of the file from there, its folders made if they are missing.
        name: Of the tensor.
        array: Of a numeric dtype, any byte order.
    """
    plain = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    folder.write(relative, plain.tobytes())
    return VectorFile(name=name, file=relative, dtype=array.dtype.name, shape=array.shape)


def write_graph_vectors(
    folder: ExportFolder,
    golden: Golden,
    role_name: str,
    role: Role,
    variant: Variant,
    axes: Mapping[str, Axis],
) -> GraphVectors:
    """Write the golden vectors of one variant.

    As many samples as the largest batch takes; inputs are shared by the variants of a role.

    Args:
        folder: Of the document.
        golden: The bundle's golden vectors.
        role_name: Name of the role.
        role: The role.
        variant: The variant whose outputs are written.
        axes: Bounds of the dynamic axes.
    """
    inputs, outputs = golden.inputs[role_name], golden.outputs[role_name][variant.name]
    batch = role.inputs[0].shape[0]
    samples = len(inputs[role.inputs[0].name])
    if isinstance(batch, str) and batch in axes:
        samples = min(samples, axes[batch].max)
    names = _file_names([entry.name for entry in (*role.inputs, *role.outputs)])

    def written(array: Array, name: str, part: str) -> VectorFile:
        kept = array[:samples] if isinstance(batch, str) else array
        relative = f"{VECTORS}/{role_name}/{part}/{names[name]}.bin"
        return write_raw(folder, relative, name, kept)

    return GraphVectors(
        samples=samples,
        inputs=tuple(written(inputs[e.name], e.name, "inputs") for e in role.inputs),
        outputs=tuple(written(outputs[e.name], e.name, variant.name) for e in role.verified),
        tolerance=variant.tolerance,
    )


def _file_names(tensors: list[str]) -> dict[str, str]:
    """Return a unique, portable file name for each tensor."""
    names: dict[str, str] = {}
    for tensor in tensors:
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", tensor)[:100]
        name, count = plain, 1
        while name in names.values():
            count += 1
            name = f"{plain}-{count}"
        names[tensor] = name
    return names
