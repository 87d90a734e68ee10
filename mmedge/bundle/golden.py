"""Golden vectors: reference inputs and outputs, in an uncompressed npz file.

The archive is what `numpy.savez` writes, narrowed down: stored (never compressed) members of
little-endian, C-ordered numbers, with fixed dates and a fixed order. So the same arrays give the
same bytes, and a reader needs neither a decompressor nor trust in what a header declares.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmedge.errors import InputError, IntegrityError
from mmedge.files import write_atomic
from mmedge.files.json_file import read_file
from mmedge.specs import Array

__all__ = ["MAX_GOLDEN_BYTES", "Golden", "load_golden", "save_golden"]

MAX_GOLDEN_BYTES = 1 << 30

_EPOCH = (1980, 1, 1, 0, 0, 0)  # earliest date in a zip
_NUMERIC_KINDS = "biuf"
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '(\|[biu]1|<[iu][248]|<f[248])', 'fortran_order': False, "
    rb"'shape': \(((?:[0-9]{1,10}, ){0,40}[0-9]{0,10},?)\), \} *\n"
)
_MAX_AXES = 32  # limit of every numpy version

# The parts of a zip file: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Inputs, and the outputs of every variant at conversion.

    Attributes:
        inputs: Arrays by input name, by role; one batch that fits the role's specs.
        outputs: Arrays by output name, by variant, by role, computed by ONNX Runtime on CPU.
        steps: The same of roles with a state, where the inputs are run in several calls; see
            mmedge.runtimes.steps. Outputs that are state are left out.
    """

    inputs: Mapping[str, Mapping[str, Array]]
    outputs: Mapping[str, Mapping[str, Mapping[str, Array]]]
    steps: Mapping[str, Mapping[str, Mapping[str, Array]]] = field(default_factory=dict)


def save_golden(path: Path, golden: Golden) -> None:
    """Write golden vectors; the same arrays give the same bytes.

    Args:
        path: The npz file to write, whole or not at all.
        golden: Arrays of bool, integer or float dtype.

    Raises:
        InputError: If an array is not numeric, or a role or variant has an empty name or a slash.
        StorageError: If the disk is full or the place cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key, array in sorted(_flatten(golden), key=lambda item: item[0]):
            member = zipfile.ZipInfo(f"{key}.npy", date_time=_EPOCH)
            member.create_system = 3  # else it depends on the operating system
            member.external_attr = 0o644 << 16
            archive.writestr(member, _npy(key, array))
    write_atomic(path, buffer.getvalue())


def _flatten(golden: Golden) -> Iterator[tuple[str, Array]]:
    for role, arrays in golden.inputs.items():
        for name, array in arrays.items():
            yield _key("inputs", role, name=name), array
    for kind, roles in (("outputs", golden.outputs), ("steps", golden.steps)):
        for role, variants in roles.items():
            for variant, arrays in variants.items():
                for name, array in arrays.items():
                    yield _key(kind, role, variant, name=name), array


def _key(*folders: str, name: str) -> str:
    for part in folders:
        if not part or "/" in part:
            raise InputError(f"Golden vectors: {part!r} cannot name a role or variant.")
    return "/".join([*folders, name])


def _npy(key: str, array: Array) -> bytes:
    if array.dtype.kind not in _NUMERIC_KINDS:
        raise InputError(f"Golden vectors: {key} has dtype {array.dtype}, expected numbers.")
    plain = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def load_golden(path: Path) -> Golden:
    """Read golden vectors without unpickling, decompressing, or trusting headers for sizes.

    Raises:
        IntegrityError: If the file is missing, damaged, larger than MAX_GOLDEN_BYTES, or holds
            anything but plain numeric arrays under the names that save_golden gives.
    """
    data = memoryview(read_file(path, max_bytes=MAX_GOLDEN_BYTES, error=IntegrityError))
    try:
        return _unflatten(_arrays(data))
    except ValueError as error:
        raise IntegrityError(
            f"Golden vectors {path} cannot be trusted: {error}. Copy the bundle again, or convert "
            "again."
        ) from error


def _arrays(data: memoryview) -> dict[str, Array]:
    """Return the arrays of an archive by member name.

    Raises:
        ValueError: If it is anything but stored members, each listed once in the directory at the
            end, of together no more bytes than the archive.
    """
    end = len(data) - _END.size
    if end < 0:
        raise ValueError(f"it has {len(data)} bytes")
    signature, _, _, _, count, directory_bytes, at, comment = _END.unpack_from(data, end)
    if signature != b"PK\5\6" or comment or at + directory_bytes != end:
        raise ValueError("it has no directory of members at its end")
    arrays: dict[str, Array] = {}
    declared_bytes = 0
    for _ in range(count):
        name, body, at = _member(data, at, end)
        if name in arrays:
            raise ValueError(f"two members have one name, {name!r}")
        declared_bytes += len(body)
        if declared_bytes > len(data):  # members that overlap, as in a zip bomb
            raise ValueError(f"it declares {declared_bytes} bytes and has {len(data)}")
        arrays[name] = _array(name, body)
    if at != end:
        raise ValueError("its directory lists more than its end says")
    return arrays


def _member(data: memoryview, at: int, end: int) -> tuple[str, memoryview, int]:
    """Read the directory entry at `at`: name, content, and the next entry's offset."""
    if at + _ENTRY.size > end:
        raise ValueError("its directory is cut off")
    fields = _ENTRY.unpack_from(data, at)
    signature, flags, method, checksum = fields[0], fields[3], fields[4], fields[7]
    packed_bytes, size_bytes, name_bytes, extra_bytes, comment_bytes = fields[8:13]
    name = bytes(data[at + _ENTRY.size : at + _ENTRY.size + name_bytes])
    what = repr(name.decode(errors="replace"))
    if signature != b"PK\1\2":
        raise ValueError("its directory is damaged")
    if method or flags & 1:
        raise ValueError(f"{what} is compressed or encrypted")
    start = fields[16]
    local = _LOCAL.unpack_from(data, start) if start + _LOCAL.size <= len(data) else ()
    if not local or local[0] != b"PK\3\4":
        raise ValueError(f"{what} is not where the directory says")
    start += _LOCAL.size
    body = start + local[9] + local[10]
    if (
        packed_bytes != size_bytes
        or body + size_bytes > len(data)
        or data[start : start + local[9]] != name
        or zlib.crc32(data[body : body + size_bytes]) != checksum
    ):
        raise ValueError(f"{what} is cut off, or contradicts itself on its size, name or content")
    text = name.decode()
    if not text.endswith(".npy"):
        raise ValueError(f"{what} is not an array")
    following = at + _ENTRY.size + name_bytes + extra_bytes + comment_bytes
    return text.removesuffix(".npy"), data[body : body + size_bytes], following


def _array(name: str, data: memoryview) -> Array:
    start = len(_MAGIC) + 2
    length = int.from_bytes(data[len(_MAGIC) : start], "little")
    match = _HEADER.fullmatch(data[start : start + length])
    if data[: len(_MAGIC)] != _MAGIC or match is None:
        raise ValueError(f"{name!r} is not a plain numeric array")
    shape = tuple(int(size) for size in match[2].split(b",") if size.strip())
    # Only what numpy writes, so that every reader sees the same shape.
    if repr(shape).encode() != b"(%s)" % match[2] or len(shape) > _MAX_AXES:
        raise ValueError(f"{name!r} has no shape that numpy writes")
    dtype = np.dtype(match[1].decode())
    body = data[start + length :]
    if math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError(f"{name!r} declares {dtype.name}{shape} and has {len(body)} bytes")
    array = np.frombuffer(body, dtype).reshape(shape).copy()  # a buffer aligned for its dtype
    array.setflags(write=False)
    return array


def _unflatten(arrays: Mapping[str, Array]) -> Golden:
    inputs: dict[str, dict[str, Array]] = {}
    outputs: dict[str, dict[str, dict[str, dict[str, Array]]]] = {"outputs": {}, "steps": {}}
    for key, array in arrays.items():
        # A tensor's name may itself hold slashes, so only the leading parts are split off.
        kind, _, rest = key.partition("/")
        if kind == "inputs" and rest.count("/") >= 1:
            role, name = rest.split("/", 1)
            inputs.setdefault(role, {})[name] = array
        elif kind in outputs and rest.count("/") >= 2:
            role, variant, name = rest.split("/", 2)
            outputs[kind].setdefault(role, {}).setdefault(variant, {})[name] = array
        else:
            raise ValueError(f"{key!r} is neither an input nor an output")
    return Golden(
        MappingProxyType(inputs),
        MappingProxyType(outputs["outputs"]),
        MappingProxyType(outputs["steps"]),
    )
