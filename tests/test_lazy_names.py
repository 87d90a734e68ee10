"""The names of `mmedge` itself: fetched when used, light to import, known to type checkers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import mmedge


def test_type_checkers_see_the_names_that_are_fetched() -> None:
    tree = ast.parse(Path(mmedge.__file__).read_text(encoding="utf-8"))
    guarded = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == mmedge._HOMES
    assert sorted([*homes, "__version__"]) == sorted(mmedge.__all__)


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_import_is_light_and_load_brings_no_engine() -> None:
    heavy = {"numpy", "pydantic", "PIL", "tokenizers", "onnxruntime", "torch", "transformers"}
    assert not loaded_by("import mmedge") & heavy
    brought = loaded_by("from mmedge import load, DualEncoder")
    assert {"numpy", "PIL"} <= brought
    assert not brought & {"tokenizers", "onnxruntime", "torch", "transformers", "onnx"}
