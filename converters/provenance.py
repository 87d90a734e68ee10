"""Provenance of a bundle: tools, command and time, without local paths."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata

from mmedge.bundle.manifest import Provenance
from mmedge.bundle.quality import Quality
from mmedge.converters.config import ConvertConfig
from mmedge.converters.sources.source import Source
from mmedge.errors import ConversionError

__all__ = ["describe_provenance", "tool_versions"]

_TOOLS = (
    "mmedge",
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tokenizers",
    "safetensors",
    "numpy",
    "openvino",
    "pillow",
)


def describe_provenance(
    source: Source,
    config: ConvertConfig,
    weights_sha256: str,
    *,
    calibration_sha256: str | None,
    calibration_samples: int,
    jpeg_draft: Quality | None = None,
) -> Provenance:
    """Describe a conversion.

    `created` is now, or SOURCE_DATE_EPOCH where that is set, as reproducible builds have it.

    Raises:
        ConversionError: If SOURCE_DATE_EPOCH is not a number of seconds.
    """
    return Provenance(
        source=source.name,
        revision=source.revision,
        weights_sha256=weights_sha256,
        calibration_sha256=calibration_sha256,
        calibration_samples=calibration_samples,
        jpeg_draft=jpeg_draft,
        tools=tool_versions(),
        command=_command(source, config),
        created=_created(os.environ),
    )


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the tools that a conversion runs on."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        with suppress(metadata.PackageNotFoundError):  # onnxruntime-gpu has another name
            versions[tool] = metadata.version(tool)
    return versions


def _command(source: Source, config: ConvertConfig) -> str:
    """Return the command that rebuilds this bundle, with file names instead of paths."""
    words = ["mmedge", "convert", source.name]
    if source.revision is not None:
        words += ["--revision", source.revision]
    if source.adapter is not None:
        words.append("--merge-adapter")
    words += ["-o", config.out.name, "--precision", ",".join(config.precisions)]
    for option, path in (("--calibration", config.calibration), ("--evaluate", config.evaluate)):
        if path is not None:
            words += [option, path.resolve().name]
    words += ["--target", ",".join(config.targets)]
    if config.default is not None:
        words += ["--default", config.default]
    if config.template != ConvertConfig.template:
        words += ["--template", config.template]
    if config.searches:
        words += ["--max-drop", f"{config.max_drop:g}", "--objective", config.objective]
        words += [] if config.metric is None else ["--metric", config.metric]
    if config.jpeg_draft != ConvertConfig.jpeg_draft:
        words += ["--jpeg-draft", config.jpeg_draft]
    if config.explain:
        words.append("--explain")
    if config.skip_bad:
        words.append("--skip-bad")
    if config.seed:
        words += ["--seed", str(config.seed)]
    return shlex.join(words)


def _created(environment: Mapping[str, str]) -> str:
    given = environment.get("SOURCE_DATE_EPOCH")
    if given is None:
        moment = datetime.now(timezone.utc)
    else:
        try:
            moment = datetime.fromtimestamp(int(given), timezone.utc)
        except (ValueError, OverflowError, OSError) as error:
            raise ConversionError(
                f"SOURCE_DATE_EPOCH: got '{given}', expected seconds since 1970. Unset it."
            ) from error
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
