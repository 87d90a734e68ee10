"""ONNX file reader without onnx or protobuf: specs, opset, dtypes, external data.

Reads the protobuf wire format (https://protobuf.dev/programming-guides/encoding/) of the few
fields that a device needs, numbered as in onnx.proto
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). The file is mapped, not read: weights are
stepped over, so a large model costs some milliseconds. Numbers, names, nesting and the number of
fields are bounded, so a hostile file costs seconds at most and ends in a BackendError.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.errors import BackendError
from mmedge.specs import Dim, TensorSpec

__all__ = [
    "PAIRED_KEY",
    "ExternalData",
    "OnnxFile",
    "axis_dim",
    "check_external_data",
    "read_onnx_file",
]

PAIRED_KEY = "mmedge.paired"
"""Metadata key of a model: "true" if no sum of two int8 products exceeds 16 bits."""

# onnx.proto: TensorProto.DataType, for the types that numpy has.
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}
_UINT8, _INT8, _FLOAT16 = 2, 3, 10
_FLOAT8 = (17, 18, 19, 20)  # E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ
_EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL

# Limits beyond any real model, against hostile files that cost time or memory.
_MAX_FIELDS = 4_000_000
_MAX_GRAPHS = 32  # nesting depth that protobuf allows
_MAX_NAME_BYTES = 1 << 16
_MAX_AXES = 32  # limit of every numpy version
_MAX_SIZE = 2**31 - 1
_OFFSET = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Location of a tensor's bytes outside the ONNX file.

    Attributes:
        location: POSIX path relative to the ONNX file's folder, as written in the file.
        end_bytes: The location must be at least this long.
    """

    location: str
    end_bytes: int


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """Contents of an ONNX file, without weights.

    Attributes:
        ir_version: Version of the file format.
        opset: Opset of the default domain, 0 if only other domains are imported.
        inputs: Input specs, initializers left out.
        outputs: Output specs.
        has_fp16: Whether an input, an output or an initializer is float16.
        external_data: One entry for every tensor whose bytes lie elsewhere, or might.
        signed_int8: Whether it holds DequantizeLinear, initializers of int8 and none of uint8, as
            Q/DQ with signed values does.
        paired: Whether its metadata say that no sum of two int8 products passes 16 bits.
        has_fp8: Whether an initializer is a float of 8 bits.
        may_loop: Whether a node may be a Loop or a Scan, so that a run need not end.
    """

    ir_version: int
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    has_fp16: bool
    external_data: tuple[ExternalData, ...]
    signed_int8: bool = False
    paired: bool = False
    has_fp8: bool = False
    may_loop: bool = False

    @property
    def external_locations(self) -> tuple[str, ...]:
        """Paths of external data, sorted."""
        return tuple(sorted({entry.location for entry in self.external_data}))


def axis_dim(size: int | str | None, tensor: str, axis: int) -> Dim:
    """Return the Dim of an axis from a file or an engine; unnamed axes get a name."""
    if isinstance(size, int) and size >= 0:
        return size
    return size if isinstance(size, str) and size.strip() else f"{tensor}.{axis}"


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file without its weights.

    Raises:
        BackendError: If the file is missing, is not ONNX, is cut short, or is beyond the bounds of
            this module.
    """
    try:
        if not path.is_file():
            raise BackendError(
                f"{path}: no such model file. Check the path, or `mmedge verify` the bundle."
            )
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,  # ValueError if empty
        ):
            return _Reader(data).model()
    except OSError as error:
        raise BackendError(f"{path}: cannot be read: {error.strerror}.") from error
    except _UnsupportedTypeError as error:
        raise BackendError(
            f"{path}: {error}, which cannot be fed as a numpy array. Convert the model with "
            "float32, float16 or integer tensors as inputs and outputs."
        ) from error
    except ValueError as error:
        raise BackendError(
            f"{path}: not a readable ONNX model ({error}). It is cut short, damaged or of another "
            "format: copy the file again, or `mmedge verify` the bundle."
        ) from error


def check_external_data(path: Path, model: OnnxFile) -> None:
    """Check that a model's external data is complete and in or below its folder.

    Raises:
        BackendError: If a location leaves the model's folder, is missing, or is too short.
    """
    folder = path.parent.resolve()
    needed: dict[str, int] = {}
    for entry in model.external_data:
        needed[entry.location] = max(entry.end_bytes, needed.get(entry.location, 0))
    for location, size_bytes in needed.items():
        what = f"{path}: its external data '{location}'"
        try:
            file = (folder / location).resolve()
            inside = file.is_relative_to(folder) and not Path(location).is_absolute()
            got_bytes = file.stat().st_size if inside and file.is_file() else None
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
            raise BackendError(f"{what} cannot be reached: {error}. Copy it again.") from error
        if not inside:
            raise BackendError(
                f"{what} leads outside {folder}. Rejected: external data must lie beside the model."
            )
        if got_bytes is None:
            raise BackendError(f"{what} is missing from {folder}. Copy it there, beside the model.")
        if got_bytes < size_bytes:
            raise BackendError(
                f"{what} is cut short: got {got_bytes} bytes, expected at least {size_bytes}. "
                "Copy it again."
            )


class _UnsupportedTypeError(Exception):
    """An input or output that numpy cannot hold."""


class _Reader:
    """Reader of one mapped file; each method reads the message in [begin, end)."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._held: set[int] = set()  # dtypes of initializers
        self._passed: set[int] = set()  # dtypes of inputs and outputs
        self._external: list[ExternalData] = []
        self._steps = self._depth = 0
        self._loops = False

    def model(self) -> OnnxFile:
        ir_version = opset = 0
        inputs: tuple[TensorSpec, ...] | None = None
        outputs: tuple[TensorSpec, ...] = ()
        paired = False
        for number, first, second in self._fields(0, len(self._data)):
            if number == 1 and second < 0:
                ir_version = first
            elif number == 7:
                if inputs is not None:
                    raise ValueError("it holds two graphs")
                inputs, outputs = self._graph(first, second)
            elif number == 8:
                opset = self._opset(first, second) or opset
            elif number == 14:
                entry = [(inner, self._data[a:b]) for inner, a, b in self._fields(first, second)]
                paired |= entry == [(1, PAIRED_KEY.encode()), (2, b"true")]
            elif number in (20, 25):
                self._note_loops(first, second)
                if not self._mentions_external(first, second):
                    continue
                for inner, a, b in self._fields(first, second):
                    if number == 20:  # training
                        self._graph(a, b)
                    elif inner == 7:  # a function's nodes
                        self._node(a, b)
                    elif inner == 11:  # and defaults
                        self._attribute(a, b)
        if inputs is None:
            raise ValueError("it holds no graph")
        return OnnxFile(
            ir_version,
            opset,
            inputs,
            outputs,
            _FLOAT16 in self._held | self._passed,
            tuple(self._external),
            signed_int8=self._held & {_INT8, _UINT8} == {_INT8}
            and self._data.find(b"DequantizeLinear") >= 0,
            paired=paired,
            has_fp8=not self._held.isdisjoint(_FLOAT8),
            may_loop=self._loops,
        )

    def _fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (number, begin, end) for messages and bytes, (number, value, -1) for integers."""
        if end < 0:
            raise ValueError(f"a number is where a message is expected: {begin}")
        at = begin
        while at < end:
            self._steps += 1
            if self._steps > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            wire = tag & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield tag >> 3, value, -1
                continue
            if wire == 2:
                length, at = self._varint(at, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {at} is not protobuf")
            if length > end - at:
                raise ValueError(f"a field runs past byte {end}")
            if wire == 2:
                yield tag >> 3, at, at + length
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise ValueError(f"a number at byte {at} is cut off")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
        raise ValueError(f"a number at byte {at} is longer than 64 bits")

    def _text(self, begin: int, end: int) -> str:
        if end - begin not in range(_MAX_NAME_BYTES + 1):
            raise ValueError(f"a name at byte {begin} is none, or is longer than 64 KiB")
        return self._data[begin:end].decode()

    def _opset(self, begin: int, end: int) -> int:
        """Return the version if the domain is the default one, else 0."""
        domain, version = "", 0
        for number, first, second in self._fields(begin, end):
            if number == 1:
                domain = self._text(first, second)
            elif number == 2 and second < 0:
                version = first
        return version if domain in ("", "ai.onnx") else 0

    def _mentions_external(self, begin: int, end: int) -> bool:
        # Every external tensor spells the key "location"; where the bytes are absent, there is no
        # need to step through the message.
        return self._data.find(b"location", begin, end) >= 0

    def _note_loops(self, begin: int, end: int) -> None:
        # A node spells its operator in plain bytes; a name with the same bytes does no harm.
        found = (self._data.find(name, begin, end) for name in (b"Loop", b"Scan"))
        self._loops = self._loops or max(found) >= 0

    def _graph(self, begin: int, end: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        self._depth += 1
        if self._depth > _MAX_GRAPHS:
            raise ValueError(f"more than {_MAX_GRAPHS} graphs are nested in each other")
        initializers: set[str] = set()
        inputs: list[tuple[int, int]] = []
        outputs: list[tuple[int, int]] = []
        for number, first, second in self._fields(begin, end):
            if number == 1:
                self._note_loops(first, second)
                if self._mentions_external(first, second):
                    self._node(first, second)
            elif number == 5:
                initializers.add(self._tensor(first, second))
            elif number == 11:
                inputs.append((first, second))
            elif number == 12:
                outputs.append((first, second))
            elif number == 15:
                self._sparse_tensor(first, second)
        self._depth -= 1
        return (
            tuple(spec for spec in map(self._value, inputs) if spec.name not in initializers),
            tuple(map(self._value, outputs)),
        )

    def _node(self, begin: int, end: int) -> None:
        for number, first, second in self._fields(begin, end):
            if number == 5:
                self._attribute(first, second)

    def _attribute(self, begin: int, end: int) -> None:
        for number, first, second in self._fields(begin, end):
            if number in (5, 10):
                self._tensor(first, second)
            elif number in (6, 11):
                self._graph(first, second)
            elif number in (22, 23):
                self._sparse_tensor(first, second)

    def _sparse_tensor(self, begin: int, end: int) -> None:
        for number, first, second in self._fields(begin, end):
            if number in (1, 2):
                self._tensor(first, second)

    def _tensor(self, begin: int, end: int) -> str:
        """Record a tensor's dtype and external data, and return its name."""
        name, external = "", False
        entries: dict[str, list[str]] = {}
        for number, first, second in self._fields(begin, end):
            if number == 2 and second < 0:
                self._held.add(first)
            elif number == 8:
                name = self._text(first, second)
            elif number == 13:
                key, values = "", []
                for inner, a, b in self._fields(first, second):
                    if inner == 1:
                        key = self._text(a, b)
                    elif inner == 2:
                        values.append(self._text(a, b))
                entries.setdefault(key, []).extend(values)
            elif number == 14:
                external = first == _EXTERNAL
        end_bytes = _size(entries, "offset") + _size(entries, "length")
        # A location is recorded even if the tensor does not use it, or has two.
        for location in entries.get("location", []) or [""] * external:
            self._external.append(ExternalData(location, end_bytes))
        return name

    def _value(self, span: tuple[int, int]) -> TensorSpec:
        """Read a ValueInfoProto."""
        name, kind = "", (0, 0)
        for number, first, second in self._fields(*span):
            if number == 1:
                name = self._text(first, second)
            elif number == 2:
                kind = (first, second)
        code, shape = 0, (0, 0)
        for number, first, second in self._fields(*kind):
            if number != 1:
                raise _UnsupportedTypeError(f"'{name}' is not a dense tensor")
            for inner, a, b in self._fields(first, second):
                if inner == 1 and b < 0:
                    code = a
                elif inner == 2:
                    shape = (a, b)
        if code not in _DTYPES:
            raise _UnsupportedTypeError(f"'{name}' has ONNX element type {code}")
        self._passed.add(code)
        axes = [self._axis(a, b) for number, a, b in self._fields(*shape) if number == 1]
        sizes = [size for size in axes if isinstance(size, int)]
        if len(axes) > _MAX_AXES or max(sizes, default=0) > _MAX_SIZE:
            raise ValueError(f"'{name}' has {len(axes)} axes of up to {max(sizes, default=0)}")
        return TensorSpec(
            name,
            np.dtype(_DTYPES[code]),
            tuple(axis_dim(size, name, axis) for axis, size in enumerate(axes)),
        )

    def _axis(self, begin: int, end: int) -> int | str | None:
        for number, first, second in self._fields(begin, end):
            if number == 1 and second < 0 and first < 1 << 63:  # a negative size means unknown
                return first
            if number == 2 and second > first:
                return self._text(first, second)
        return None


def _size(entries: dict[str, list[str]], key: str) -> int:
    """Return the number in an entry of a tensor's external data, in bytes."""
    stated = entries.get(key, ["0"])
    if not all(_OFFSET.fullmatch(text) for text in stated):
        raise ValueError(f"the {key} of external data is not a number: {stated[0][:40]!r}")
    return max(map(int, stated), default=0)
