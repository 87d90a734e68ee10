"""Node table of a variant: format, errors and reason of each node.

It is a JSON file beside the models, `ROLE/VARIANT.nodes.json`, named by the manifest and hashed
with the other files. Nothing needs it to run a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mmedge.bundle.reading import DocumentKind, read_document
from mmedge.files import write_atomic

__all__ = [
    "MAX_NODES_BYTES",
    "NODES_VERSION",
    "NodeEntry",
    "NodeTable",
    "load_nodes",
    "save_nodes",
    "with_output_errors",
]

MAX_NODES_BYTES = 16 << 20
NODES_VERSION = "1.0"

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_MAX_NODES = 20_000

Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Size = Annotated[int, Field(ge=1)]


class NodeEntry(BaseModel):
    """Quantization result of one linear layer or embedding table.

    Attributes:
        name: The weight's name without ".weight": the same in every layout of the role.
        op_type: Of the float node it was made from ("MatMul", "Gemm", "Gather").
        precision: What it computes in ("int8", "int4", "float32", ...).
        shape: Of the weight: (in, out), or (rows, columns) of a table.
        low: Smallest input of the calibrated range, None where no range was calibrated.
        high: Largest input of that range.
        weight_error: ||W - Wq||_F / ||W||_F, None where it was not measured.
        output_error: 1 - mean cosine with the fp32 embedding where only this node is quantized,
            on calibration data; None where it was not measured.
        reason: Why the node has a higher precision than was requested, or a lower one; "" where it
            has that.
    """

    model_config = _FROZEN
    name: Text
    op_type: Text
    precision: Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]{0,31}$")]
    shape: tuple[Size, Size]
    low: float | None = None
    high: float | None = None
    weight_error: float | None = Field(default=None, ge=0)
    output_error: float | None = Field(default=None, ge=0, le=2)
    reason: Annotated[str, StringConstraints(max_length=1024)] = ""

    @property
    def place(self) -> tuple[str, str]:
        """Block and name within it: ("layers.0", "mlp.fc1")."""
        parts = self.name.split(".")
        last = max((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), default=-1)
        return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :])

    @model_validator(mode="after")
    def _check_range(self) -> NodeEntry:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high come together")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class NodeTable(BaseModel):
    """The nodes of one variant, in the graph's order.

    Attributes:
        format_version: "major.minor" of this document.
        role: Role name.
        variant: Variant name.
        nodes: Linear layers and embedding tables. Layers that share a weight share a name.
        samples: Calibration samples behind output_error, 0 where none was measured.
    """

    model_config = _FROZEN
    format_version: str = Field(default=NODES_VERSION, pattern="^[0-9]+\\.[0-9]+$")
    role: Text
    variant: Text
    nodes: tuple[NodeEntry, ...] = Field(max_length=_MAX_NODES)
    samples: int = Field(default=0, ge=0)


_KIND = DocumentKind("node table", NodeTable, NODES_VERSION, MAX_NODES_BYTES)


def load_nodes(path: Path) -> NodeTable:
    """Read a node table.

    Raises:
        ManifestError: If it cannot be read, is larger than MAX_NODES_BYTES, is not UTF-8 JSON,
            repeats a key, is of a newer version, or does not hold together.
    """
    return read_document(path, _KIND)


def save_nodes(path: Path, table: NodeTable) -> None:
    """Write a node table atomically; equal tables give equal bytes.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    document = table.model_dump(mode="json")
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def with_output_errors(
    nodes: Iterable[NodeEntry], errors: Mapping[str, float]
) -> tuple[NodeEntry, ...]:
    """Return the entries with their measured embedding errors.

    Args:
        nodes: What became of each node.
        errors: 1 - mean cosine by node name; a node that is not in it keeps what it had.
    """
    return tuple(
        NodeEntry.model_validate(
            {**node.model_dump(), "output_error": max(float(errors[node.name]), 0.0)}
        )
        if node.name in errors
        else node
        for node in nodes
    )
