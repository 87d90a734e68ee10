"""Bounds of a role's dynamic axes."""

from __future__ import annotations

import pytest

from mmedge.bundle import Bundle
from mmedge.runtimes import SessionOptions
from mmedge.sessions import opening
from mmedge.sessions.axes import dynamic_axes
from mmedge.sessions.opening import open_variant
from mmedge.specs import Axis


def test_a_batch_is_what_is_encoded_at_once(tiny_bundle: Bundle) -> None:
    assert dynamic_axes(tiny_bundle.manifest, "image_encoder") == {"batch": Axis(1, 1, 8)}
    assert dynamic_axes(tiny_bundle.manifest, "text_encoder")["batch"] == Axis(1, 1, 32)
    for asked, most in ((64, 64), (4, 8)):
        axes = dynamic_axes(tiny_bundle.manifest, "image_encoder", batch=asked)
        assert axes == {"batch": Axis(1, 1, most)}


def test_other_axes_have_the_bounds_of_the_manifest(tiny_bundle: Bundle) -> None:
    axes = dynamic_axes(tiny_bundle.manifest, "text_encoder", batch=64)
    assert axes == {"batch": Axis(1, 1, 64), "sequence": Axis(1, 6, 6)}


def test_a_session_is_opened_with_the_manifests_bounds(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SessionOptions] = []
    monkeypatch.setattr(opening, "check_graph", lambda *_: None)
    monkeypatch.setattr(opening, "open_session", lambda *_, options, **__: seen.append(options))
    variant = tiny_bundle.variant("image_encoder")
    mine = {"batch": Axis(2, 2, 2)}

    for axes in (None, mine):
        options = SessionOptions(threads=1, axes=axes)
        open_variant(tiny_bundle, variant, backend_name="fake", options=options)

    assert [options.axes for options in seen] == [{"batch": Axis(1, 1, 8)}, mine]
    assert all(options.threads == 1 for options in seen)
