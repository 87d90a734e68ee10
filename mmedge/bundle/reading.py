"""JSON files of a bundle: parsing, version checks and error messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from mmedge.bundle.manifest import FORMAT_VERSION, Manifest
from mmedge.errors import ManifestError
from mmedge.files.json_file import parse_json, read_file

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
    data = read_file(path, max_bytes=kind.max_bytes, error=_damaged)
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
    document = parse_json(data, path, error=_damaged)
    newer_minor = _check_version(document, path, kind)
    try:
        # From the text: strict JSON mode rejects "8" for 8 and true for 1.
        return kind.model.model_validate_json(data, strict=True)
    except ValidationError as error:
        faults = "\n".join(_faults(error, kind.name))
        if newer_minor is not None:
            raise ManifestError(
                f"{path} has format version {newer_minor}, newer than {kind.version}, and uses "
                f"fields unknown to this mmedge. Upgrade mmedge.\n{faults}"
            ) from error
        raise ManifestError(
            f"{path} is not a valid {kind.name}. Copy the bundle again, or convert again.\n{faults}"
        ) from error


def _damaged(message: str) -> ManifestError:
    return ManifestError(f"{message} Copy the bundle again, or convert again.")


def _check_version(document: object, path: Path, kind: DocumentKind[ModelT]) -> str | None:
    """Return the version if it is a newer minor, None if it is known.

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
            f"{path} has format version {found}; the newest supported by this mmedge is "
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
