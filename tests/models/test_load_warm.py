"""load(warm=...): one backend runs while another process builds engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundles import edit_manifest

import mmedge
from mmedge.bundle import Bundle
from mmedge.errors import BackendUnavailableError, InputError, IntegrityError
from mmedge.runtimes import BACKENDS
from mmedge.sessions.warming import WarmingState

# Replaces TensorRT: "builds" by writing a file, then computes in ONNX Runtime.
_BACKEND = '''
"""An engine for tests: made by prepare, opened only once it is there."""
import os, pathlib, time
from dataclasses import replace

from mmedge.errors import BackendUnavailableError, EngineBuildError
from mmedge.runtimes.backends import BACKENDS, Backend, backend

BACKENDS["slow"] = f"{__name__}:BACKEND"
FOLDER = pathlib.Path(os.environ["SLOW_FOLDER"])
OPENED = []


class Slow(Backend):
    name = title = "slow"

    def engine_version(self):
        return "1.0"

    def layouts(self, device):
        return ("portable",)

    def available_devices(self):
        return () if (FOLDER / "no-gpu").exists() else ("cuda",)

    def prepare(self, model, options, progress=None):
        progress("build", 0, 1)
        (FOLDER / f"{model.parent.name}.building").write_text(str(options.axes))
        if (FOLDER / "fails").exists():
            raise EngineBuildError("node 'n' (op Foo) is not taken")
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
        (FOLDER / f"{model.parent.name}.engine").touch()

    def open_session(self, model, options):
        if options.device not in self.available_devices() + ("cuda:0",):
            raise BackendUnavailableError("There is no GPU here. Use another machine.")
        assert (FOLDER / f"{model.parent.name}.engine").exists()
        OPENED.append(model)
        return backend("onnxruntime").open_session(model, replace(options, device="cpu"))


BACKEND = Slow()
'''


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "slow_backend.py").write_text(_BACKEND)
    (folder / "sitecustomize.py").write_text("import slow_backend\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SLOW_FOLDER", str(folder))
    monkeypatch.syspath_prepend(folder)
    before = dict(BACKENDS)
    yield folder
    BACKENDS.clear()
    BACKENDS.update(before)


@pytest.fixture
def registered(slow: Path) -> Iterator[Path]:
    import importlib
    import sys

    sys.modules.pop("slow_backend", None)
    importlib.import_module("slow_backend")
    yield slow
    sys.modules.pop("slow_backend", None)


def test_it_runs_at_once_and_the_engines_take_over(tiny_bundle: Bundle, registered: Path) -> None:
    seen: list[tuple[str, str]] = []
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    with mmedge.load(
        tiny_bundle.path,
        device="cuda",
        backend="slow",
        warm="onnxruntime",
        warming_report=lambda role, state: seen.append((role, state.stage)),
    ) as model:
        before = model.encode_image(image), model.encode_text("red circle")
        assert model.warming["image_encoder"].stage in {"waiting", "building"}
        assert "until slow is ready" in model.choices["text_encoder"].reason
        (registered / "go").touch()
        assert model.wait_until_warm(60)
        assert {state.stage for state in model.warming.values()} == {"ready"}
        after = model.encode_image(image), model.encode_text("red circle")
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)
    assert list(dict.fromkeys(seen)) == [
        (role, stage)
        for role in ("image_encoder", "text_encoder")
        for stage in ("building", "checking", "ready")
    ]
    bounds = (registered / "image_encoder.building").read_text()
    assert bounds == "{'batch': Axis(min=1, opt=1, max=8)}"  # from the manifest


def test_calls_go_on_through_the_swap(tiny_bundle: Bundle, registered: Path) -> None:
    with mmedge.load(
        tiny_bundle.path,
        device="cuda",
        backend="slow",
        warm="onnxruntime",
        roles=["text_encoder"],
    ) as model:
        expected = model.encode_text("red circle")
        stop = threading.Event()
        outputs: list[np.ndarray] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                while not stop.is_set():
                    outputs.append(model.encode_text("red circle"))
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        (registered / "go").touch()
        assert model.wait_until_warm(60)
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert outputs
    for output in outputs:
        np.testing.assert_allclose(output, expected, atol=1e-6)


def test_a_failed_build_is_reported_and_the_first_backend_goes_on(
    tiny_bundle: Bundle, registered: Path
) -> None:
    (registered / "fails").touch()
    with mmedge.load(
        tiny_bundle.path,
        device="cuda",
        backend="slow",
        warm="onnxruntime",
        roles=["text_encoder"],
    ) as model:
        assert not model.wait_until_warm(60)
        state = model.warming["text_encoder"]
        assert state == WarmingState("failed", "node 'n' (op Foo) is not taken")
        assert model.encode_text("red").shape == (1, 4)


def test_closing_ends_the_build(tiny_bundle: Bundle, registered: Path) -> None:
    model = mmedge.load(tiny_bundle.path, device="cuda", backend="slow", warm="onnxruntime")
    model.close()
    assert {state.stage for state in model.warming.values()} == {"stopped"}


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_the_gpu_it_is_an_error_at_once(
    device: str, tiny_bundle: Bundle, registered: Path
) -> None:
    if device == "cuda":
        (registered / "no-gpu").touch()
    with pytest.raises(BackendUnavailableError, match="no GPU here"):
        mmedge.load(tiny_bundle.path, device=device, backend="slow", warm="onnxruntime")
    assert not list(registered.glob("*.building"))


def test_the_first_gpu_has_two_names(tiny_bundle: Bundle, registered: Path) -> None:
    (registered / "go").touch()
    with mmedge.load(
        tiny_bundle.path,
        device="cuda:0",
        backend="slow",
        warm="onnxruntime",
        roles=["text_encoder"],
    ) as model:
        assert model.wait_until_warm(60)


def test_a_variant_without_a_graph_for_engines_is_an_error_at_once(
    tiny_bundle: Bundle, registered: Path
) -> None:
    variants = tiny_bundle.manifest.model_dump(mode="json")["roles"]["image_encoder"]["variants"]
    (path,) = variants[1]["models"].values()
    edit_manifest(
        tiny_bundle.path,
        "roles",
        "image_encoder",
        "variants",
        1,
        "models",
        value={"onnxruntime": path},
    )
    with pytest.raises(InputError, match="portable"):
        mmedge.load(
            tiny_bundle.path,
            device="cuda",
            backend="slow",
            warm="onnxruntime",
            precision="int8",
        )


def test_damaged_golden_vectors_are_found_before_any_build(
    tiny_bundle: Bundle, registered: Path
) -> None:
    path = tiny_bundle.file(tiny_bundle.manifest.golden)
    path.write_bytes(b"nothing")
    with pytest.raises(IntegrityError):
        mmedge.load(tiny_bundle.path, device="cuda", backend="slow", warm="onnxruntime")
    assert not list(registered.glob("*.building"))
