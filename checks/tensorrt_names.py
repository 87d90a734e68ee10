"""Writes down which names TensorRT's Python bindings have, version by version.

python checks/tensorrt_names.py           # tests/runtimes/trt/tensorrt_names.json
python checks/tensorrt_names.py 10.3.0 11.4.0.106

TensorRT itself needs a GPU and libraries of gigabytes. Its bindings are a wheel of a megabyte that
wants nine functions of those libraries to be imported, so they get nine that do nothing. Needs pip
with a package index, a C compiler, and Linux on x86-64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).parents[1] / "tests" / "runtimes" / "trt" / "tensorrt_names.json"
# The oldest that is served, JetPack 6.2, the last without and the first with a runtime
# configuration, the last 10.x, JetPack 7.2.
VERSIONS = ("10.0.1", "10.3.0", "10.10.0.31", "10.11.0.33", "10.16.1.11", "11.4.0.106")
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILayer", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "IOutputAllocator", "IProgressMonitor",
    "IRuntimeConfig", "ITensor", "ITimingCache", "LayerInformationFormat", "LayerType",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserRefitter",
    "ParserError", "ProfilingVerbosity", "Refitter", "Runtime", "TensorIOMode", "TensorLocation",
)  # fmt: skip
_FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
_TELL = """
import json, sys
import tensorrt_bindings as module
print(json.dumps({
    name: sorted(word for word in dir(getattr(module, name)) if not word.startswith("_"))
    for name in sys.argv[1:] if hasattr(module, name)
}))
"""


def names(version: str, folder: Path) -> dict[str, list[str]]:
    """Return the public names of each class that a version has."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*fetch, f"tensorrt-cu12-bindings=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    major = version.split(".", maxsplit=1)[0]
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        file = folder / f"lib{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", file, source], check=True)
    told = subprocess.run(
        [sys.executable, "-c", _TELL, *CLASSES],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)},
    )
    found: dict[str, list[str]] = json.loads(told.stdout)
    return found


def main() -> None:
    """Write down the names of the versions that are given."""
    known = {}
    for version in sys.argv[1:] or VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            known[version] = names(version, Path(folder))
        print(version, sum(map(len, known[version].values())), "names")
    # A name with the versions that lack it: most have every name.
    classes = {
        name: {
            word: [v for v in known if word not in known[v].get(name, ())]
            for word in sorted({word for found in known.values() for word in found.get(name, ())})
        }
        for name in CLASSES
    }
    lines = ",\n".join(f'"{name}": {json.dumps(words)}' for name, words in classes.items())
    OUT.write_text(f'{{"versions": {json.dumps(list(known))}, "lacking": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
