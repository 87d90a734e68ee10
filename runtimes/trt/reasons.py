"""Causes of library failures, with fixes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmedge.runtimes.trt.flavours import BuildLog

__all__ = ["informative", "parser_errors", "reason_of", "short"]

_NO_GPU = r"cudaError|CUDA driver|no CUDA-capable device|CUDA initialization"
# Pattern in the library's message -> fix; the first match applies.
_FIXES = {
    _NO_GPU: (
        "It builds for the GPU of this machine, and none can be used: check nvidia-smi and the "
        "driver. TensorRT-RTX builds without a GPU for named compute capabilities, such as 8.9."
    ),
    r"insufficient workspace|[Cc]ould not find any implementation": (
        "Allow a larger workspace, or build for smaller shapes."
    ),
    r"out of memory|OutOfMemory|bad_alloc|Requested amount of GPU memory": (
        "Build for smaller shapes or with a smaller workspace, or free memory."
    ),
    r"HW-specific datatypes|not supported for Turing|Unsupported SM": (
        "The GPU has no kernels for this precision: choose another variant or another GPU."
    ),
    r"[Pp]rofile|kMAX|kMIN": "Check the bounds of the dynamic axes.",
}
_NEEDS_GPU = "Stripped and refittable engines are built only on a machine with a GPU."
# Logged for every failure without a driver, and for every graph with int64 inputs.
_NOISE = re.compile(r"catchCudaError|Make sure input .* has Int64 binding")
_PLACES = re.compile(r"\s*\bIn \S+ at /\S+?:\d+|^\S+\.cpp:\d+: |\[\w+\.(?:cpp|h):\d+: \w+\] ")
_MAX_LENGTH = 500


def reason_of(log: BuildLog, raised: str = "", *, exchanges_weights: bool = False) -> str:
    """Return why something failed and, if known, the fix.

    Args:
        log: The library's messages.
        raised: The message of the library's exception, "" without one.
        exchanges_weights: Whether the engine is stripped or refittable.
    """
    reasons = list(informative(log.errors)) or [raised or "; ".join(map(short, log.errors))]
    reason = "; ".join(reasons[:3]) or "no reason given"
    text = f"{reason} {raised}"
    fix = next((fix for pattern, fix in _FIXES.items() if re.search(pattern, text)), "")
    if exchanges_weights and re.search(rf"CUDA_SUCCESS|{_NO_GPU}", text):
        fix = _NEEDS_GPU
    return f"{reason.rstrip('.')}. {fix}".rstrip()


def informative(messages: Sequence[str]) -> tuple[str, ...]:
    """Return the informative messages of a library, shortened, without duplicates."""
    return tuple(dict.fromkeys(short(text) for text in messages if not _NOISE.search(text)))


def short(message: str) -> str:
    """Return a message without source locations, 500 characters at most."""
    text = " ".join(_PLACES.sub("", message).split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def parser_errors(parser: Any) -> str:  # noqa: ANN401, of the library
    """Return the errors of an ONNX parser or refitter; "" if it reports none."""
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    return "; ".join(dict.fromkeys(_parser_error(error) for error in errors))


def _parser_error(error: Any) -> str:  # noqa: ANN401, the library's ParserError
    """Return the rejected node and the reason."""
    name, operator = (str(getattr(error, part)()) for part in ("node_name", "node_operator"))
    text = short(str(error.desc()))
    return f"node '{name or error.node()}' ({operator}): {text}" if operator else text
