"""Golden vectors: a few inputs and the answers to them, kept as an npz of the plainest kind.

The archive is what `numpy.savez` writes, narrowed down: stored (never compressed) members of
little-endian, C-ordered numbers, with fixed dates and a fixed order. So the same arrays give the
same bytes, and a reader needs neither a decompressor nor trust in what a header declares.
"""

from __future__ import annotations

import ast
import io
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmedge.errors import InputError, IntegrityError
from mmedge.files import write_atomic
from mmedge.specs import Array

__all__ = ["MAX_GOLDEN_BYTES", "Golden", "load_golden", "save_golden"]

MAX_GOLDEN_BYTES = 1 << 30

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
_NUMERIC_KINDS = "biuf"
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf][1248])', 'fortran_order': False, "
    rb"'shape': (\([0-9, ]{0,200}\)), \} *\n"
)


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Inputs, and the outputs that every variant gave for them at conversion.

    Attributes:
        inputs: Arrays by input name, by role; one batch that fits the role's specs.
        outputs: Arrays by output name, by variant, by role, computed by ONNX Runtime on CPU.
    """

    inputs: Mapping[str, Mapping[str, Array]]
    outputs: Mapping[str, Mapping[str, Mapping[str, Array]]]


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
            member.create_system = 3  # else the byte tells the system that wrote it
            member.external_attr = 0o644 << 16
            archive.writestr(member, _npy(key, array))
    write_atomic(path, buffer.getvalue())


def _flatten(golden: Golden) -> Iterator[tuple[str, Array]]:
    for role, arrays in golden.inputs.items():
        for name, array in arrays.items():
            yield _key("inputs", role, name=name), array
    for role, variants in golden.outputs.items():
        for variant, arrays in variants.items():
            for name, array in arrays.items():
                yield _key("outputs", role, variant, name=name), array


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
    """Read golden vectors. Nothing is unpickled, decompressed, or allocated on a header's word.

    Raises:
        IntegrityError: If the file is missing, damaged, larger than MAX_GOLDEN_BYTES, or holds
            anything but plain numeric arrays under the names that save_golden gives.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_GOLDEN_BYTES:
            raise _damaged(path, f"{size_bytes} bytes, more than {MAX_GOLDEN_BYTES}")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members, size_bytes)
            arrays = {
                member.filename.removesuffix(".npy"): _array(path, member, archive.read(member))
                for member in members
            }
    except OSError as error:
        raise IntegrityError(
            f"Cannot read golden vectors {path}: {error.strerror or error}."
        ) from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        # ValueError: zipfile meets an impossible offset or an undecodable name.
        raise _damaged(path, str(error) or type(error).__name__) from error
    return _unflatten(path, arrays)


def _damaged(path: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"Golden vectors {path} cannot be trusted: {reason}. Copy the bundle again, or convert "
        "again."
    )


def _check_members(path: Path, members: list[zipfile.ZipInfo], size_bytes: int) -> None:
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise _damaged(path, "two members have one name")
    for member in members:
        if not member.filename.endswith(".npy"):
            raise _damaged(path, f"{member.filename!r} is not an array")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _damaged(path, f"{member.filename!r} is compressed or encrypted")
        if member.file_size != member.compress_size:
            raise _damaged(path, f"{member.filename!r} contradicts itself on its size")
    declared_bytes = sum(member.file_size for member in members)
    if declared_bytes > size_bytes:  # members that overlap, as in a zip bomb
        raise _damaged(path, f"it declares {declared_bytes} bytes and has {size_bytes}")


def _array(path: Path, member: zipfile.ZipInfo, data: bytes) -> Array:
    start = len(_MAGIC) + 2
    length = int.from_bytes(data[len(_MAGIC) : start], "little")
    match = _HEADER.fullmatch(data[start : start + length])
    if not data.startswith(_MAGIC) or match is None:
        raise _damaged(path, f"{member.filename!r} is not a plain numeric array")
    dtype = np.dtype(match[1].decode())
    shape = ast.literal_eval(match[2].decode())
    body = memoryview(data)[start + length :]
    if math.prod(shape) * dtype.itemsize != len(body):
        raise _damaged(
            path, f"{member.filename!r} declares {dtype.name}{shape} and has {len(body)} bytes"
        )
    array = np.frombuffer(body, dtype).reshape(shape)
    array.setflags(write=False)
    return array


def _unflatten(path: Path, arrays: Mapping[str, Array]) -> Golden:
    inputs: dict[str, dict[str, Array]] = {}
    outputs: dict[str, dict[str, dict[str, Array]]] = {}
    for key, array in arrays.items():
        # A tensor's name may itself hold slashes, so only the leading parts are split off.
        kind, _, rest = key.partition("/")
        if kind == "inputs" and rest.count("/") >= 1:
            role, name = rest.split("/", 1)
            inputs.setdefault(role, {})[name] = array
        elif kind == "outputs" and rest.count("/") >= 2:
            role, variant, name = rest.split("/", 2)
            outputs.setdefault(role, {}).setdefault(variant, {})[name] = array
        else:
            raise _damaged(path, f"{key!r} is neither an input nor an output")
    return Golden(MappingProxyType(inputs), MappingProxyType(outputs))
