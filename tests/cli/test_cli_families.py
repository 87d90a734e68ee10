"""`mmedge families`: every registered family, described by its own file."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from mmedge.cli import main
from mmedge.converters import families


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["families", *arguments])
    assert not done.value.code
    return capsys.readouterr().out


def test_every_family_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    found = {each["name"]: each["summary"] for each in json.loads(listed(capsys, "--json"))}
    assert sorted(found) == sorted(families.FAMILIES)
    assert all(len(summary) > 15 for summary in found.values())
    shown = listed(capsys)
    assert all(f" {name} " in shown for name in found)


def test_families_of_other_packages_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = EntryPoint("other", "nowhere.to_be_found:FAMILY", families.ENTRY_POINTS)
    monkeypatch.setattr(families, "entry_points", lambda **_: [other])
    found = {each["name"]: each["summary"] for each in json.loads(listed(capsys, "--json"))}
    assert found["other"] == "nowhere.to_be_found (cannot be found)"


def test_listing_loads_no_torch() -> None:
    code = (
        "import sys; from mmedge.cli.families import families; families(json=True); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
