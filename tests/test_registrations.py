"""What the next family, kind or modality costs: its own files, and one line in each registry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mmedge.bundle.kinds import Kind
from mmedge.converters.evaluation.base import EVALUATIONS, evaluation_class
from mmedge.converters.families import FAMILIES
from mmedge.models.registry import MODELS, model_class
from mmedge.preprocess.registry import PROCESSORS

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("mmedge", "converters", "runtimes")
    for path in (ROOT / folder).rglob("*.py")
]
KINDS = [each.model_fields["type"].default for each in Kind.__origin__.__args__]  # type: ignore[attr-defined]


def file_of(place: str) -> Path:
    """The file of "mmedge.converters.x:NAME"."""
    parts = place.split(":", maxsplit=1)[0].split(".")
    if parts[1] in {"converters", "runtimes"}:
        parts = parts[1:]
    return ROOT.joinpath(*parts).with_suffix(".py")


def naming(pattern: str, *left_out: Path) -> Iterator[str]:
    """Files whose code names a pattern, some left out."""
    for path in SOURCES:
        if path not in left_out and re.search(pattern, path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_one_file_and_one_line(name: str) -> None:
    own, registry = file_of(FAMILIES[name]), ROOT / "converters" / "families" / "__init__.py"
    assert own.is_file()
    module = FAMILIES[name].split(":")[0]
    others = list(naming(rf"{re.escape(module)}\b", own, registry))
    # A user's module is drawn inputs as an ONNX file is, and a head may be one.
    shared = [f"converters/{each}.py" for each in ("fusing", "head_folders", "modules")]
    assert sorted(others) == (shared if name == "onnx" else [])


def test_every_family_has_its_row_in_the_docs() -> None:
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*families/(test_\w+\.py)\) \|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == FAMILIES.keys() - {"onnx"}, (
        "Run python checks/family_table.py, which converts each and writes docs/families.md."
    )
    for _, test in rows:
        assert (ROOT / "tests" / "converters" / "families" / test).is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_three_files_and_three_lines(kind: str) -> None:
    section = ROOT / "mmedge" / "bundle" / "kinds" / f"{kind}.py"
    device, evaluation = file_of(MODELS[kind]), file_of(EVALUATIONS[kind])
    for path in (section, device, evaluation):
        assert path.is_file()
    assert model_class(kind).kind == kind
    assert evaluation_class(kind).metrics
    registries = (ROOT / "mmedge/models/registry.py", ROOT / "converters/evaluation/base.py")
    # Nothing else asks which kind it is by name.
    branches = naming(rf"""type (==|is|in) .*["']{kind}["']""", section, device, *registries)
    assert list(branches) == []


@pytest.mark.parametrize("registry", [MODELS, EVALUATIONS])
def test_every_kind_is_registered_and_nothing_else(registry: Mapping[str, str]) -> None:
    assert sorted(registry) == sorted(KINDS)


@pytest.mark.parametrize("modality", PROCESSORS)
def test_a_modality_is_a_device_processor_and_its_line(modality: str) -> None:
    assert file_of(PROCESSORS[modality]).is_file()
