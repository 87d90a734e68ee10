"""Records of benchmarks: one JSON file with the settings to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mmedge.files.atomic import write_atomic

__all__ = ["RESULTS", "argument_parser", "int8_instructions", "machine", "record", "versions"]

RESULTS = Path(__file__).parent / "results"

_PACKAGES = (
    "mmedge", "numpy", "onnxruntime", "tokenizers", "pillow", "pydantic", "torch", "transformers",
    "optimum", "onnx", "openvino", "nncf", "onnxruntime-gpu", "cuda-bindings", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings",
)  # fmt: skip


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the one option that every benchmark has.

    Args:
        description: What the benchmark measures; its module's docstring.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = Path(sys.argv[0]).stem
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write"
    )
    return parser


def record(output: Path, results: Mapping[str, Any]) -> None:
    """Write results and machine to a file, and print its path.

    Args:
        output: JSON file to write; its name is the benchmark's.
        results: Figures whose names end in their units.
    """
    document = {
        "benchmark": output.stem,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": machine(),
        "versions": versions(),
        "results": dict(results),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, (json.dumps(document, indent=2) + "\n").encode())
    print(f"wrote {output}")


def machine() -> dict[str, Any]:
    """Return a description of the machine and its load."""
    return {
        "processor": _processor(),
        "int8_instructions": int8_instructions(),
        "processors_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages that are installed."""
    installed = {
        found.metadata["Name"].lower(): found.version
        for found in distributions()
        if found.metadata["Name"]
    }
    shown = {name: installed[name] for name in _PACKAGES if name in installed}
    return {"python": platform.python_version(), **shown}


def _command() -> str:
    """Return the command line without this machine's folders."""
    root = Path(__file__).parents[1]
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def int8_instructions() -> list[str]:
    """Return the processor's int8 instructions.

    An x86 processor with none of it adds pairs of products in 16 bits.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text("utf-8", "replace").split() if info.is_file() else []
    known = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    return [name for name in known if name in flags]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
