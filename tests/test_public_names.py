"""What users may import: every `__all__` is there and true, and mmedge's own is held by a list."""

from __future__ import annotations

import ast
import builtins
import importlib
from pathlib import Path

import pytest

import mmedge
from mmedge import errors

ROOT = Path(__file__).parents[1]
TREES = {"mmedge": "mmedge", "mmedge.converters": "converters", "mmedge.runtimes": "runtimes"}

# Adding a name here is a promise to users; taking one away breaks them.
PUBLIC = [
    "Bundle",
    "Classification",
    "Detections",
    "Detector",
    "DualEncoder",
    "EncodedFiles",
    "Encoder",
    "Features",
    "HeadOutput",
    "Index",
    "Match",
    "MmedgeError",
    "PrototypeBank",
    "SessionOptions",
    "Stamped",
    "__version__",
    "load",
    "load_head",
    "open_bundle",
    "verify_bundle",
]


def modules() -> dict[str, Path]:
    return {
        ".".join([package, *file.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): file
        for package, folder in TREES.items()
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = modules()


def test_the_public_names_are_these() -> None:
    assert sorted(mmedge.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_can_be_had_and_is_listed(name: str) -> None:
    assert getattr(mmedge, name) is not None
    assert name in dir(mmedge)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lod"):
        mmedge.lod  # noqa: B018


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_name_of_all_exists(name: str) -> None:
    module = importlib.import_module(name)
    only_a_docstring = len(ast.parse(MODULES[name].read_text("utf-8")).body) == 1
    names = [] if only_a_docstring else module.__all__
    assert len(set(names)) == len(names)
    missing = [listed for listed in names if not hasattr(module, listed)]
    assert missing == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_error_in_a_docstring_exists(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    raised = [line.strip() for doc in docs for line in doc.partition("Raises:")[2].splitlines()]
    named = {
        error
        for line in raised
        for error in line.partition(":")[0].split(", ")
        if error.isidentifier() and error.endswith("Error")
    }
    # A module may have errors of its own that go no further than its neighbours.
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    unknown = {error for error in named if not hasattr(errors, error)} - set(dir(builtins)) - own
    assert unknown == set()
