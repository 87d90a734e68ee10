"""convert_head_folder(): a head from a folder with `head.json` and an ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmedge.bundle.kinds.heads import Meaning, Missing
from mmedge.converters.config import HEAD_FILE, ConvertConfig
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.onnx_graph import FAMILY
from mmedge.converters.fusing import fuse_head
from mmedge.converters.heads.base import HeadSpec, SensorInput, TapInput
from mmedge.converters.modules import convert_head_role
from mmedge.converters.progress import Progress
from mmedge.converters.report import ConversionReport
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.files.json_file import read_json
from mmedge.files.safetensors_file import read_safetensors
from mmedge.specs import Array

__all__ = ["LARGE_BYTES", "convert_head_folder", "is_large"]

LARGE_BYTES = 8 << 20
"""Size of a head's graph up to which quantizing it gains nothing: a few microseconds."""

_MAX_BYTES = 1 << 20


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    modality: str | None = None
    tap: str = "embedding"
    missing: Missing = "refuse"
    max_skew_ms: float | None = Field(default=None, ge=0)


class _HeadFile(BaseModel):
    """The content of `head.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    graph: str = Field(default="head.onnx", pattern=r"^[\w.-]+\.onnx$")
    inputs: dict[str, _Input] = Field(min_length=1)
    present: str | None = None
    defaults: str | None = Field(default=None, pattern=r"^[\w.-]+\.safetensors$")
    labels: tuple[str, ...] = ()
    meanings: dict[str, Meaning] = Field(default_factory=dict)
    precision: str | None = None


def is_large(folder: Path | str) -> bool:
    """Return whether a head is large enough for quantization to pay."""
    sizes = (path.stat().st_size for path in Path(folder).glob("*.onnx*"))
    return sum(sizes) > LARGE_BYTES


def convert_head_folder(
    config: ConvertConfig,
    on: Sequence[Path],
    *,
    fuse: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a head to a bundle of kind `fused`, or to one graph with its encoders.

    The folder holds an ONNX file and `head.json`: `inputs` (by input: `modality` and `tap` for a
    tap, `missing`, `max_skew_ms`), and optionally `graph` (head.onnx), `present`, `defaults` (a
    safetensors file), `labels`, `meanings` and `precision`, as in HeadSpec.

    Args:
        config: Settings; `source` is the folder.
        on: Bundles of the encoders.
        fuse: Write one graph of the encoders and the head.
        progress: Progress callback.

    Raises:
        SourceError: If the folder has no head, or one that cannot be read.
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    folder = Path(config.source)
    named = replace(config, source=folder.resolve().name)
    if not fuse:
        return _convert(folder, named, on, progress)
    with tempfile.TemporaryDirectory() as place:
        head = Path(place) / "head.mmedge"
        plain = replace(
            named, out=head, precisions=("fp32",), default=None, calibration=None, evaluate=None
        )
        _convert(folder, plain, on, progress)
        return fuse_head(head, on, named, progress)


def _convert(
    folder: Path, config: ConvertConfig, on: Sequence[Path], progress: Progress | None
) -> ConversionReport:
    document = read_json(folder / HEAD_FILE, max_bytes=_MAX_BYTES, error=SourceError)
    try:
        file = _HeadFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SourceError(
            f"{folder / HEAD_FILE}: {place or 'the document'}: {first['msg']}. See docs/heads.md."
        ) from error
    graph = folder / file.graph
    if not graph.is_file():
        raise SourceError(f"{folder / HEAD_FILE} names {file.graph}, which is not there. Add it.")
    learned: dict[str, Array] = {}
    if file.defaults is not None:
        learned, _ = read_safetensors(folder / file.defaults, error=SourceError)
    if unknown := sorted(learned.keys() - file.inputs.keys()):
        raise SourceError(
            f"{folder / str(file.defaults)}: '{unknown[0]}' is no input of {HEAD_FILE}, expected "
            f"some of {list(file.inputs)}. Rename or remove it."
        )
    inputs: dict[str, TapInput | SensorInput] = {}
    for name, each in file.inputs.items():
        default = learned.get(name)
        if each.modality is None:
            inputs[name] = SensorInput(each.missing, each.max_skew_ms, default)
        else:
            inputs[name] = TapInput(
                each.missing, each.max_skew_ms, default, each.modality, each.tap
            )
    spec = HeadSpec(on, inputs, file.present, file.labels, file.meanings, file.precision)
    source = Source(folder, config.source, None, {"model_type": "fused"}, (), {}, graph=graph)
    role: RoleSpec = FAMILY.describe(source, None).roles["module"]()
    return convert_head_role(role, config, spec, source.sha256(), progress)
