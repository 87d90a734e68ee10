"""load(): which variant, which layout, which device."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import edit_manifest

import mmedge
from mmedge.bundle import Bundle, Variant
from mmedge.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    InputError,
    ManifestError,
)
from mmedge.models import DualEncoder
from mmedge.models.fused import FusedModel
from mmedge.models.module import Module
from mmedge.models.registry import MODELS, model_class
from mmedge.preprocess import ImageOptions
from mmedge.runtimes.fake import FakeSession
from mmedge.runtimes.session import SessionOptions
from mmedge.sessions.opening import open_variant, session_options


def names(path: Path, **arguments: Any) -> dict[str, str]:
    with mmedge.load(path, backend="fake", **arguments) as model:
        return {role: variant.name for role, variant in model.variants.items()}


def test_highest_fidelity_is_the_default(tiny_bundle: Bundle) -> None:
    assert names(tiny_bundle.path) == {"image_encoder": "fp32", "text_encoder": "fp32"}


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_precision_or_variant_name(precision: str, tiny_bundle: Bundle) -> None:
    both = {"image_encoder": "int8-dynamic", "text_encoder": "int8-dynamic"}
    assert names(tiny_bundle.path, precision=precision) == both
    only_image = names(tiny_bundle.path, precision={"image_encoder": precision})
    assert only_image == {"image_encoder": "int8-dynamic", "text_encoder": "fp32"}


def test_variants_really_differ(tiny_bundle: Bundle) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    with (
        mmedge.load(tiny_bundle.path) as full,
        mmedge.load(tiny_bundle.path, precision="int8") as rounded,
    ):
        difference = np.abs(full.encode_image(image) - rounded.encode_image(image)).max()
    assert 0 < difference < 0.05


def test_an_unknown_precision_or_role_lists_the_known_ones(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no variant 'int4', expected one of \['fp32', 'int8-d"):
        mmedge.load(tiny_bundle.path, precision="int4")
    with pytest.raises(InputError, match=r"\['audio_encoder'\], expected some of \['image_enc"):
        mmedge.load(tiny_bundle.path, precision={"audio_encoder": "fp32"})


def test_image_options_reach_the_processor(tiny_bundle: Bundle) -> None:
    options = {"channels": "bgr", "alpha": "drop", "max_pixels": 99}
    with mmedge.load(tiny_bundle.path, backend="fake", **options) as model:
        assert model.image_processor.options == ImageOptions(**options)
    with pytest.raises(InputError, match="channels: got 'gbr'"):
        mmedge.load(tiny_bundle.path, channels="gbr")  # type: ignore[arg-type]


def test_a_model_is_loaded_again_in_a_spawned_process(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.path.parent)
    frame = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    options = {"precision": "int8", "backend": "onnxruntime", "channels": "bgr"}
    with (
        mmedge.load(tiny_bundle.path.name, **options) as model,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        expected = model.encode_image(frame)
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(pool.submit(model.encode_image, frame).result(), expected)
        copied = pickle.loads(pickle.dumps(model))  # noqa: S301, our own bytes
        assert {variant.name for variant in copied.variants.values()} == {"int8-dynamic"}
        copied.close()


def bare_head() -> FusedModel:
    return object.__new__(FusedModel)


def test_a_fused_head_is_sent_with_its_encoder(tiny_bundle: Bundle) -> None:
    head = bare_head()
    head._reopen = bare_head
    with mmedge.load(tiny_bundle.path) as encoder:
        assert isinstance(encoder, DualEncoder)
        head._encoders = (encoder,)
        copied = pickle.loads(pickle.dumps(head))  # noqa: S301, our own bytes
        with copied._encoders[0] as other:
            np.testing.assert_array_equal(other.encode_text("red"), encoder.encode_text("red"))


def test_a_model_that_load_did_not_make_cannot_be_sent(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="Load the bundle there"):
        pickle.dumps(DualEncoder(tiny_bundle, {}, {}))


def test_roles_limit_loading(tiny_bundle: Bundle) -> None:
    with mmedge.load(tiny_bundle.path, roles=["text_encoder"]) as model:
        assert list(model.sessions) == ["text_encoder"]
        assert model.encode_text("red").shape == (1, 4)
    for roles in ([], ["vision"], ["image_encoder", "vision"]):
        with pytest.raises(InputError, match=r"expected one or more of \['image_encoder', 'te"):
            mmedge.load(tiny_bundle.path, roles=roles)
    with pytest.raises(InputError, match=r"Pass \['text_encoder'\]"):
        mmedge.load(tiny_bundle.path, roles="text_encoder")


def test_path_may_be_a_str_and_must_be_a_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert names(str(tiny_bundle.path))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="does not exist"):
        mmedge.load(tmp_path / "nowhere.mmedge")


def test_bundle_of_another_kind_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="is a DualEncoder bundle, not a Module"):
        Module.load(tiny_bundle.path)


def test_a_kind_without_a_class_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODELS, "dual_encoder")
    with pytest.raises(BundleError, match=r"No model class for kind 'dual_encoder'.*Update"):
        model_class("dual_encoder")


def test_a_role_that_the_kind_does_not_know_is_named(tiny_bundle: Bundle) -> None:
    roles = tiny_bundle.manifest.model_dump(mode="json")["roles"]
    roles["audio_encoder"] = roles["image_encoder"]
    edit_manifest(tiny_bundle.path, "roles", value=roles)
    with pytest.raises(ManifestError, match="role 'audio_encoder' is not one that kind"):
        mmedge.load(tiny_bundle.path)


def test_unknown_backend_and_device(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match="Unknown backend: got 'abacus'"):
        mmedge.load(tiny_bundle.path, backend="abacus")
    with pytest.raises(BackendUnavailableError, match="no device 'cuda'"):
        mmedge.load(tiny_bundle.path, backend="fake", device="cuda")


def test_first_session_is_closed_if_the_second_cannot_be_opened(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FakeSession] = []

    def open_once(*arguments: object, **named: object) -> FakeSession:
        if opened:
            raise BackendError("refused")
        opened.append(FakeSession((), ()))
        return opened[0]

    monkeypatch.setattr("mmedge.sessions.choice.open_in_time", open_once)
    with pytest.raises(BackendError, match="refused"):
        mmedge.load(tiny_bundle.path)
    with pytest.raises(BackendError, match="closed"):
        opened[0].run({})


def test_device_settles_from_argument_then_options_then_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert session_options("fake", None, None) == SessionOptions(device="cpu")
    monkeypatch.setattr("mmedge.runtimes.fake.BACKEND.available_devices", lambda: ("cuda", "cpu"))
    assert session_options("fake", None, None).device == "cuda"
    assert session_options("fake", None, SessionOptions(threads=2)) == SessionOptions(threads=2)
    settled = session_options("fake", "cuda:1", SessionOptions(threads=2))
    assert settled == SessionOptions(device="cuda:1", threads=2)
    monkeypatch.setattr("mmedge.runtimes.fake.BACKEND.available_devices", lambda: ())
    assert session_options("fake", None, None).device == "cpu"


@pytest.mark.parametrize(
    ("backend_name", "device", "held", "expected"),
    [
        ("onnxruntime", "cpu", ("portable", "onnxruntime"), "onnxruntime"),
        ("onnxruntime", "cpu", ("portable",), "portable"),
        ("onnxruntime", "cuda", ("portable", "onnxruntime"), "portable"),
        ("onnxruntime", "cuda", ("onnxruntime",), "onnxruntime"),
        ("openvino", "cpu", ("portable", "onnxruntime"), "portable"),
        ("openvino", "cpu", ("onnxruntime",), None),
        ("fake", "cpu", ("onnxruntime",), "onnxruntime"),
    ],
)
def test_layout_suits_backend_and_device(
    backend_name: str,
    device: str,
    held: tuple[str, ...],
    expected: str | None,
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"portable": "image_encoder/fp32.onnx", "onnxruntime": "text_encoder/fp32.onnx"}
    models = {layout: files[layout] for layout in held}
    variant = tiny_bundle.variant("image_encoder").model_copy(update={"models": models})
    asked: list[Path] = []

    def ask(model: Path, *, backend_name: str, options: SessionOptions) -> None:
        asked.append(model)

    monkeypatch.setattr("mmedge.sessions.opening.open_session", ask)
    monkeypatch.setattr("mmedge.sessions.opening.check_graph", lambda *_: None)

    def opened(variant: Variant) -> None:
        open_variant(
            tiny_bundle, variant, backend_name=backend_name, options=SessionOptions(device=device)
        )

    if expected is None:
        with pytest.raises(InputError, match="has no model in"):
            opened(variant)
    else:
        opened(variant)
        assert asked == [tiny_bundle.path / files[expected]]


def test_loading_from_several_threads(tiny_bundle: Bundle) -> None:
    outputs: list[np.ndarray[Any, Any]] = []

    def work() -> None:
        with mmedge.load(tiny_bundle.path) as model:
            outputs.append(model.encode_text("red"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(np.array_equal(output, outputs[0]) for output in outputs)
