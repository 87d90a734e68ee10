"""How large the dynamic axes of a role are said to get."""

from __future__ import annotations

import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, open_bundle
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


@pytest.mark.parametrize(
    ("padding", "most", "expected"),
    [
        ("longest", 77, (1, 16, 77)),
        ("longest", 5, (1, 5, 5)),
        ("max_length", 64, (1, 64, 64)),
    ],
)
def test_a_text_goes_up_to_the_tokenizers_length(
    padding: str, most: int, expected: tuple[int, int, int], tiny_bundle: Bundle
) -> None:
    edit_manifest(tiny_bundle.path, "preprocessing", "text", "padding", value=padding)
    edit_manifest(tiny_bundle.path, "preprocessing", "text", "max_length", value=most)
    axes = dynamic_axes(open_bundle(tiny_bundle.path).manifest, "text_encoder")
    assert axes["sequence"] == Axis(*expected)


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
