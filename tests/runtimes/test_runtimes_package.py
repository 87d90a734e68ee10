"""What the package offers."""

from __future__ import annotations

import importlib

import pytest

import mmedge.runtimes
from mmedge.runtimes import BACKENDS, session

MODULES = ["session", "ort.session", "ort.engine", "onnx_file", "fake"]


def test_the_package_offers_the_contract_whole() -> None:
    assert mmedge.runtimes.__all__ == session.__all__
    for name in session.__all__:
        assert getattr(mmedge.runtimes, name) is getattr(session, name)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_there(name: str) -> None:
    module = importlib.import_module(f"mmedge.runtimes.{name}")

    # Constants, classes, functions, as ruff sorts them.
    order = sorted(module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert list(module.__all__) == order
    assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_offers_what_the_protocol_asks(name: str) -> None:
    found = session.backend(name)

    assert isinstance(found.available_devices(), tuple)
    assert callable(found.open_session)
