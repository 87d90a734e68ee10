"""Who may import whom, read from the source and seen at run time."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmedge.runtimes import BACKENDS

ROOT = Path(__file__).parents[1]
TREES = {"mmedge": ROOT / "mmedge", "mmedge.converters": ROOT / "converters"}
TREES["mmedge.runtimes"] = ROOT / "runtimes"

# Layer -> the layers it may import besides itself. "mmedge" is the package's own __init__; a row is
# a folder or, at the top of `converters/` and `runtimes/`, a file.
BASE = {"children", "closing", "errors", "specs", "files", "energy", "notebook", "telemetry"}
GRAPHS = {f"runtimes.{name}" for name in ("session", "backends", "processor", "onnx_file", "steps")}
GRAPHS |= {"runtimes"}
DEVICE = BASE | {"ahead", "preprocess", "bundle", "runtimes.selection", "runtimes.engines"} | GRAPHS
SESSIONS = DEVICE | {"machine", "sessions"}
MODELS = SESSIONS | {"generation", "postprocess", "models"}
PLAN = {f"converters.{name}" for name in ("config", "progress", "report", "methods", "provenance")}
ARROWS: dict[str, set[str]] = {
    "closing": set(),
    "errors": set(),
    "specs": {"errors"},
    "files": {"errors"},
    "energy": {"errors"},
    "notebook": set(),
    "telemetry": set(),
    "children": {"telemetry"},
    "preprocess": BASE,
    "ahead": {"runtimes.processor"},
    "runtimes": GRAPHS,
    "runtimes.session": BASE,
    "runtimes.backends": BASE | {"runtimes.session", "runtimes.engines"},
    "runtimes.engines": BASE | {"runtimes.session", "runtimes.onnx_file"},
    "runtimes.processor": BASE,
    "runtimes.onnx_file": BASE,
    "runtimes.steps": BASE | {"runtimes.session"},
    "runtimes.state": BASE | GRAPHS | {"runtimes.base"},
    "runtimes.base": BASE | GRAPHS | {"runtimes.state"},
    "runtimes.selection": BASE | GRAPHS,
    "runtimes.cuda": BASE,
    "runtimes.fake": BASE | GRAPHS | {"runtimes.base"},
    "runtimes.ort": BASE | GRAPHS | {"runtimes.base", "runtimes.state"},
    "runtimes.openvino": BASE | GRAPHS | {"runtimes.base"},
    "runtimes.trt": BASE
    | GRAPHS
    | {"runtimes.base", "runtimes.state", "runtimes.cuda", "runtimes.engines"},
    "bundle": BASE | {"preprocess", "runtimes.onnx_file"},
    "machine": BASE | GRAPHS | {"runtimes.selection"},
    "media": BASE | {"preprocess"},
    "postprocess": BASE,
    "sessions": DEVICE | {"machine"},
    "generation": BASE | GRAPHS | {"preprocess"},
    "models": SESSIONS | {"generation", "postprocess"},
    "exports": SESSIONS,
    "retrieval": MODELS | {"media"},
    "streaming": MODELS | {"media"},
    "profiling": MODELS,
    "reports": DEVICE | {"profiling"},
    "serving": MODELS | {"media", "retrieval", "streaming"},
    "mmedge": MODELS | {"retrieval"},
    "__main__": {"cli"},
    "cli": MODELS
    | {"exports", "media", "mmedge", "profiling", "reports", "retrieval", "serving", "streaming"},
}
# The workstation's rows, in the order of the work. Each may import those before it, its own device
# layers, and the settings and reports of a conversion.
_CONVERTERS = (
    {"quiet"},
    {"methods"},
    {"progress"},
    {"report"},
    {"config"},
    {"numerics"},
    {"passes"},
    {"sources"},
    {"families", "heads"},
    {"graphs"},
    {"data"},
    {"provenance"},
    {"statistics", "evaluation"},
    {"quantization", "distillation"},
    {"variants"},
    {"tuning"},
    {"writing", "described"},
    {"pipeline"},
    {"request"},
    {"modules"},
    {"fusing"},
    {"head_folders"},
)
_below: set[str] = set()
for _names in _CONVERTERS:
    for _name in _names:
        ARROWS[f"converters.{_name}"] = DEVICE | {"generation", "postprocess"} | _below
    _below |= {f"converters.{_name}" for _name in _names}
ARROWS["converters"] = _below | {"telemetry"}
# The gate runs the loop that the device runs.
ARROWS["converters.evaluation"] |= MODELS | {"retrieval"}
# Where the two halves meet, inside the functions of two commands.
CONVERTERS_ALLOWED_IN = {"mmedge.cli.convert", "mmedge.cli.families"}
WORKSTATION = {"torch", "torchvision", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript"}
ENGINES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "openvino", "cuda"}
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the source tree by the name it installs under."""
    for package, folder in TREES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = list(file.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            yield ".".join([package, *parts]), file


MODULES = dict(modules())


def layer_of(module: str) -> str:
    """The row of a module: a folder, or a file at the top of converters/ and runtimes/."""
    _, *parts = module.split(".")
    depth = 2 if parts and parts[0] in {"converters", "runtimes"} else 1
    return ".".join(parts[:depth]) or "mmedge"


def half_of(layer: str) -> str:
    return layer.split(".", maxsplit=1)[0]


def imports(
    source: str, module: str, *, is_package: bool, known: set[str]
) -> Iterator[tuple[str, bool]]:
    """Every module that a source imports, and whether it does so when it is itself imported."""
    tree = ast.parse(source)
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in late
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                # `from mmedge import files` imports a module, `from mmedge import load` a name.
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), at_import
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            argument = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
                yield str(argument.value), at_import


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports and must not."""
    layer = layer_of(module)
    found = []
    known = set(MODULES) | {f"mmedge.{name}" for name in ARROWS}
    for imported, at_import in imports(source, module, is_package=is_package, known=known):
        top = imported.split(".")[0]
        if top == "mmedge":
            target = layer_of(imported)
            if half_of(target) == "converters" and half_of(layer) != "converters":
                if module not in CONVERTERS_ALLOWED_IN:
                    found.append(f"{imported}: only {sorted(CONVERTERS_ALLOWED_IN)} may")
                elif at_import:
                    found.append(f"{imported}: only inside the command's function")
            elif target != layer and target not in ARROWS[layer]:
                found.append(f"{imported}: {layer} may import {sorted(ARROWS[layer])}")
        elif top in UNSAFE:
            found.append(f"{imported}: nothing is unpickled")
        elif half_of(layer) != "converters":
            if top in WORKSTATION:
                found.append(f"{imported}: only converters may")
            elif top in ENGINES and (
                at_import or half_of(layer) not in {"runtimes", "profiling", "cli"}
            ):
                found.append(f"{imported}: engines are imported in runtimes, inside functions")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_keeps_to_the_arrows(module: str) -> None:
    file = MODULES[module]
    is_package = file.name == "__init__.py"
    found = violations(file.read_text("utf-8"), module, is_package=is_package)
    assert found == []


DOOR = {"models", "sessions", "cli", "machine", "profiling", "reports", "generation", "serving"}
# The target of a conversion has the name of a backend, and packages have.
NAMED_IN = {"mmedge.cli.convert"}
NAMES = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, BACKENDS))})(?![\w-])")


def names_of_backends(source: str) -> list[str]:
    """Strings of a source that hold the name of a backend, docstrings left out."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in docs and NAMES.search(node.value)
    ]


@pytest.mark.parametrize(
    "module",
    [m for m in sorted(MODULES) if layer_of(m) in DOOR],
)
def test_no_module_knows_a_backend_by_its_name(module: str) -> None:
    found = names_of_backends(MODULES[module].read_text("utf-8"))
    assert found == [] or module in NAMED_IN


def test_no_module_outside_imports_a_backend() -> None:
    packages = {".".join(place.split(":")[0].split(".")[:3]) for place in BACKENDS.values()}
    packages.add("mmedge.runtimes.cuda")
    found = [
        (module, imported)
        for module, file in MODULES.items()
        if not module.startswith("mmedge.runtimes")
        for imported, _ in imports(
            file.read_text("utf-8"),
            module,
            is_package=file.name == "__init__.py",
            known=set(MODULES),
        )
        if any(imported == each or imported.startswith(f"{each}.") for each in packages)
    ]
    assert found == []


def test_a_name_of_a_backend_is_found() -> None:
    assert names_of_backends("def f(x):\n    'openvino'\n    return x == 'tensorrt-rtx'")
    assert names_of_backends("x = 'runs in onnxruntime'")
    assert not names_of_backends("def f(x):\n    'openvino'\n    return 'tensorrt-like'")


def test_no_module_imports_itself_round_about() -> None:
    """Imports at the top of modules form no circle."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        is_package = file.name == "__init__.py"
        found = imports(file.read_text("utf-8"), module, is_package=is_package, known=set(MODULES))
        graph[module] = {name for name, at_import in found if at_import and name in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_layer_has_its_row() -> None:
    assert {layer_of(module) for module in MODULES} <= set(ARROWS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmedge.specs", "from mmedge.files import sha256_file"),
        ("mmedge.preprocess.image", "from mmedge.bundle.manifest import Manifest"),
        ("mmedge.preprocess.image", "from mmedge import bundle"),
        ("mmedge.preprocess.image", "from .. import bundle"),
        ("mmedge.preprocess.image", "from ..bundle import manifest"),
        ("mmedge.preprocess.image", "from mmedge import load"),
        ("mmedge.bundle.manifest", "from mmedge.runtimes.session import Session"),
        ("mmedge.runtimes.ort.session", "import onnxruntime"),
        ("mmedge.runtimes.ort.session", "def f():\n    import torch"),
        ("mmedge.runtimes.ort.session", "import onnx.numpy_helper"),
        ("mmedge.models.dual", "def f():\n    import onnxruntime"),
        ("mmedge.models.dual", "import importlib\nimportlib.import_module('mmedge.converters')"),
        ("mmedge.models.dual", "import pickle"),
        ("mmedge.converters.pipeline", "from mmedge.models import DualEncoder"),
        ("mmedge.converters.pipeline", "from mmedge.cli import main"),
        ("mmedge.cli.convert", "from mmedge.converters.pipeline import convert"),
        ("mmedge.cli.inspect", "def f():\n    from mmedge.converters import quantize"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmedge.runtimes.ort.session", "def f():\n    import onnxruntime"),
        ("mmedge.cli.convert", "def f():\n    from mmedge.converters.pipeline import convert"),
        (
            "mmedge.converters.graphs.export",
            "import torch\nfrom mmedge.runtimes import open_session",
        ),
        ("mmedge.bundle.manifest", "from mmedge.preprocess.config import Preprocessing"),
        ("mmedge.models.dual", "from . import other\nfrom ..errors import MmedgeError"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    "module",
    [
        "mmedge",
        "mmedge.bundle",
        "mmedge.cli",
        "mmedge.exports",
        "mmedge.models",
        "mmedge.preprocess",
        "mmedge.profiling",
        "mmedge.runtimes",
        "mmedge.serving.search",
    ],
)
def test_importing_the_device_side_loads_no_engine(module: str) -> None:
    code = (
        f"import json, sys, {module}\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "tops |= {name for name in sys.modules if name.startswith('mmedge.')}\n"
        "print(json.dumps(sorted(tops)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout))
    assert module in loaded  # the list is of the process that imported it
    assert loaded & (WORKSTATION | ENGINES | {"fastapi", "starlette", "uvicorn"}) == set()
    assert not [name for name in loaded if name.startswith("mmedge.converters")]
