"""Record stored beside an engine, and the file name derived from its key.

A record is read back as untrusted input: unknown fields are refused, it is limited in size, and it
names no path. Where its plan lies follows from the key and the plan's hash.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmedge.errors import InputError
from mmedge.runtimes.engines.spec import BuiltEngine, EngineKey, EngineLayer

__all__ = [
    "MAX_RECORD_BYTES",
    "EngineRecord",
    "RecordError",
    "key_digest",
    "parse_record",
    "record_of",
    "sha256_of",
]

RECORD_FORMAT = 1
MAX_RECORD_BYTES = 64 << 20

_MAX_PLAN_BYTES = 1 << 40
_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=4096)]


class RecordError(Exception):
    """A record is invalid; the message gives the reason."""


class EngineRecord(BaseModel):
    """Facts about an engine, known without loading it.

    Attributes:
        format: Of this record.
        key: Everything that the engine depends on.
        label: The model's name for people, such as "clip.mmedge/image_encoder/fp16.onnx".
        plan_sha256: Of the plan.
        plan_size_bytes: Of the plan.
        layers: What the engine is made of; empty if the library reports none.
        duration_s: Wall time of the build.
        warnings: What the library warned of.
        mmedge: Version that built it.
        built_unix_s: When, in seconds since 1970.
    """

    model_config = _FROZEN
    format: Literal[1]
    key: EngineKey
    label: _Text
    plan_sha256: _Sha256
    plan_size_bytes: int = Field(ge=1, le=_MAX_PLAN_BYTES)
    layers: tuple[EngineLayer, ...]
    duration_s: float = Field(ge=0)
    warnings: tuple[str, ...]
    mmedge: _Text
    built_unix_s: float = Field(ge=0, le=1e11)


def key_digest(key: EngineKey) -> str:
    """Return the file name of a key: 32 hexadecimal digits, the same for equal keys."""
    document = {"format": RECORD_FORMAT, "key": asdict(key)}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def record_of(key: EngineKey, built: BuiltEngine, label: str) -> EngineRecord:
    """Return the record of a newly built engine.

    Raises:
        InputError: If the plan is empty.
    """
    if not built.plan:
        raise InputError("The plan to cache is empty: the build returned nothing.")
    return EngineRecord(
        format=RECORD_FORMAT,
        key=key,
        label=label[-4096:],
        plan_sha256=sha256_of(built.plan),
        plan_size_bytes=len(built.plan),
        layers=built.layers,
        duration_s=built.duration_s,
        warnings=built.warnings,
        mmedge=version("mmedge"),
        built_unix_s=time.time(),
    )


def parse_record(data: bytes, digest: str) -> EngineRecord:
    """Parse the record of an entry and check that it belongs to this entry.

    Args:
        data: UTF-8 JSON.
        digest: What the entry is named by.

    Raises:
        RecordError: If it is not JSON, has unknown or impossible fields, or is of another key.
    """
    try:
        record = EngineRecord.model_validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(step) for step in fault["loc"])
        reason = f"{place}: {fault['msg']}" if place else str(fault["msg"])
        raise RecordError(f"its record is damaged ({reason})") from error
    except InputError as error:  # invalid shape range
        raise RecordError(f"its record is damaged ({error})") from error
    if key_digest(record.key) != digest:
        raise RecordError("its record is of another engine, or was changed")
    return record
