"""The list of backends, and what the package offers of the contracts."""

from __future__ import annotations

import pytest

import mmedge.runtimes
from mmedge.errors import BackendUnavailableError
from mmedge.runtimes import BACKENDS, backend, backends, session
from mmedge.runtimes.backends import Backend, engine_backends, probe, require_defaults
from mmedge.runtimes.session import SessionOptions


def test_the_package_offers_the_contracts() -> None:
    assert set(session.__all__) <= set(mmedge.runtimes.__all__)
    for name in mmedge.runtimes.__all__:
        home = session if name in session.__all__ else backends
        assert getattr(mmedge.runtimes, name) is getattr(home, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_keeps_to_the_contract(name: str) -> None:
    found = backend(name)
    assert Backend in type(found).__mro__
    assert found.name == name
    assert found.title
    assert isinstance(found.available_devices(), tuple)
    assert found.layouts("mars") == () or name == "onnxruntime"
    assert (found.builder is not None) == (name in engine_backends())


def test_the_fake_opens_by_name_and_is_offered_to_nobody() -> None:
    assert backend("fake").available_devices() == ("cpu",)
    assert "fake" not in BACKENDS
    with pytest.raises(BackendUnavailableError, match="Unknown backend: got 'tea'") as caught:
        backend("tea")
    assert "fake" not in str(caught.value)
    assert "openvino" in str(caught.value)


def test_a_probe_describes_an_engine() -> None:
    assert probe("onnxruntime")["offers"] == ["CPU"]
    with pytest.raises(BackendUnavailableError, match="'tea'"):
        probe("tea")


def test_an_option_that_a_backend_lacks_is_refused() -> None:
    require_defaults("tea", SessionOptions(spin=False), ["arena"])
    with pytest.raises(BackendUnavailableError, match="no option arena: got False, expected True"):
        require_defaults("tea", SessionOptions(arena=False), ["prepack", "arena"])
