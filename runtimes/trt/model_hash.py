"""Which model an engine was built from: a hash over the ONNX file and its external data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmedge.errors import BackendError
from mmedge.files import sha256_file
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file

__all__ = ["model_label", "model_sha256"]


def model_sha256(model: Path) -> str:
    """Return one hash over an ONNX file and every file of external data that it names.

    Raises:
        BackendError: If the file is missing or damaged, or its external data is missing, cut short
            or outside the model's folder.
    """
    described = read_onnx_file(model)
    check_external_data(model, described)
    locations = sorted({entry.location for entry in described.external_data})
    try:
        hashes = [("", sha256_file(model))]
        hashes += [(location, sha256_file(model.parent / location)) for location in locations]
    except OSError as error:
        raise BackendError(f"{model}: cannot be read: {error.strerror}.") from error
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def model_label(model: Path) -> str:
    """Return a model's name for people: its file with the two folders above it."""
    return "/".join(model.absolute().parts[-3:])
