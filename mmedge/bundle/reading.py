"""From the bytes of a JSON file of a bundle to a model, or to an error that a person can act on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from mmedge.bundle.manifest import FORMAT_VERSION, Manifest
from mmedge.errors import ManifestError

__all__ = [
    "MAX_MANIFEST_BYTES",
    "DocumentKind",
    "parse_document",
    "parse_manifest",
    "read_document",
    "read_manifest",
]

MAX_MANIFEST_BYTES = 64 << 20

_MAX_FAULTS_SHOWN = 3

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class DocumentKind(Generic[ModelT]):
    """A kind of JSON file in a bundle.

    Attributes:
        name: What it is called in messages ("manifest").
        model: What it is parsed into; it has a `format_version`.
        version: The newest that is understood, "major.minor".
        max_bytes: A larger file is refused before it is parsed.
    """

    name: str
    model: type[ModelT]
    version: str
    max_bytes: int


_MANIFEST = DocumentKind("manifest", Manifest, FORMAT_VERSION, MAX_MANIFEST_BYTES)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file.

    Raises:
        ManifestError: If it cannot be read, is larger than MAX_MANIFEST_BYTES, or is refused by
            parse_manifest.
    """
    return read_document(path, _MANIFEST)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Parse and check the content of a manifest.

    Args:
        data: UTF-8 JSON.
        path: Where it came from, for messages.

    Raises:
        ManifestError: See parse_document.
    """
    return parse_document(data, path, _MANIFEST)


def read_document(path: Path, kind: DocumentKind[ModelT]) -> ModelT:
    """Read a JSON file of a bundle.

    Raises:
        ManifestError: If it cannot be read, is too large, or is refused by parse_document.
    """
    try:
        with path.open("rb") as file:
            data = file.read(kind.max_bytes + 1)
    except OSError as error:
        raise ManifestError(f"Cannot read {path}: {error.strerror}.") from error
    if len(data) > kind.max_bytes:
        raise ManifestError(
            f"{path} is larger than {kind.max_bytes >> 20} MiB, which no {kind.name} is. "
            "Copy the bundle again, or convert again."
        )
    return parse_document(data, path, kind)


def parse_document(data: bytes, path: Path, kind: DocumentKind[ModelT]) -> ModelT:
    """Parse and check the content of a JSON file.

    Args:
        data: UTF-8 JSON.
        path: Where it came from, for messages.
        kind: What it is.

    Raises:
        ManifestError: If it is not UTF-8 JSON, repeats a key, is of a newer version, or does not
            hold together; the first few faults are named with their place.
    """
    text, document = _parse_json(data, path, kind.name)
    newer_minor = _check_version(document, path, kind)
    try:
        # From the text, not the document: strict JSON mode takes no "8" for 8 and no true for 1.
        return kind.model.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = "\n".join(_faults(error, kind.name))
        if newer_minor is not None:
            raise ManifestError(
                f"{path} has format version {newer_minor}, newer than {kind.version}, and uses "
                f"what this mmedge does not know. Upgrade mmedge.\n{faults}"
            ) from error
        raise ManifestError(
            f"{path} is not a valid {kind.name}. Copy the bundle again, or convert again.\n{faults}"
        ) from error


def _parse_json(data: bytes, path: Path, what: str) -> tuple[str, object]:
    way_out = "Copy the bundle again, or convert again."
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not UTF-8 (byte {error.start}). It is damaged. {way_out}"
        ) from error
    try:
        document = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            f"It is damaged or cut off. {way_out}"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ManifestError(f"{path} is not a valid {what}: {reason}. {way_out}") from error
    return text, document


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Two readers may pick different ones of two equal keys, so neither is trusted.
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} appears twice in one object")
            seen.add(key)
    return made


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is beyond the range of a float")
    return value


def _check_version(document: object, path: Path, kind: DocumentKind[ModelT]) -> str | None:
    """Return the version where it is a newer minor, None where it is known.

    It comes before the fields are looked at: what a newer document says about itself is all that
    an older reader can rely on.
    """
    if not isinstance(document, dict):
        raise ManifestError(f"{path} is not a valid {kind.name}: got no JSON object at the top.")
    found = document.get("format_version")
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", found) if isinstance(found, str) else None
    if match is None:
        raise ManifestError(
            f"{path} is not a valid {kind.name}: got format_version {found!r}, expected "
            f"'major.minor' such as '{kind.version}'."
        )
    major, minor = int(match[1]), int(match[2])
    newest_major, newest_minor = map(int, kind.version.split("."))
    if major > newest_major:
        raise ManifestError(
            f"{path} has format version {found}; the newest that this mmedge understands is "
            f"{kind.version}. Upgrade mmedge."
        )
    if major < newest_major:
        raise ManifestError(
            f"{path} has format version {found}, which this mmedge ({kind.version}) no longer "
            "reads. Convert the model again."
        )
    return found if minor > newest_minor else None


def _faults(error: ValidationError, what: str) -> list[str]:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for detail in details[:_MAX_FAULTS_SHOWN]:
        place = ".".join(str(step) for step in detail["loc"]) or what
        if detail["type"] == "extra_forbidden":
            lines.append(f"  {place}: unknown field")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(f"  {place}: {message}")
    if len(details) > _MAX_FAULTS_SHOWN:
        lines.append(f"  and {len(details) - _MAX_FAULTS_SHOWN} more")
    return lines
