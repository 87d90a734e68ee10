"""constraints.txt and pyproject.toml agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmedge.runtimes.cuda.runtime import FOR_CUDA_12

if sys.version_info < (3, 11):
    pytest.skip("the pins are for Python 3.11 and later", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = [
    (extra, Requirement(line))
    for extra, lines in {
        "base": PROJECT["dependencies"],
        **PROJECT["optional-dependencies"],
    }.items()
    for line in lines
]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in exact}


@pytest.mark.parametrize(("extra", "requirement"), REQUIREMENTS, ids=str)
def test_every_requirement_has_a_pin_within_its_range(extra: str, requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} of [{extra}] has no line in constraints.txt"
    assert requirement.specifier.contains(pinned, prereleases=True)


@pytest.mark.parametrize(("extra", "requirement"), REQUIREMENTS, ids=str)
def test_every_requirement_states_its_lower_bound(extra: str, requirement: Requirement) -> None:
    assert [spec.operator for spec in requirement.specifier][:1] == [">="], extra


def test_pins_are_public_exact_and_single() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert sorted(set(names)) == sorted(names)
    assert "mmedge" not in names


def test_a_jetson_is_checked_with_the_bindings_that_doctor_names() -> None:
    script = (ROOT / "checks" / "jetson.sh").read_text("utf-8")
    assert f"bindings={FOR_CUDA_12}" in script
