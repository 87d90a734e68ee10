"""Keys of engines: the model, the versions and the GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cached import profile
from engine_graphs import linear_graph

from mmedge.errors import BackendError, InputError
from mmedge.runtimes.engines.model_hash import model_label
from mmedge.runtimes.engines.record import key_digest
from mmedge.runtimes.engines.spec import BuildHost, BuildSettings, EngineKey, EngineRequest
from mmedge.runtimes.engines.store import EngineCache


def save_model(path: Path, *, weight: float = 1.0, external: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return linear_graph(path, np.full((16, 8), weight, np.float32), external=external)


def key_of(model: Path, *targets: str, backend: str = "tensorrt", **here: str) -> EngineKey:
    request = EngineRequest(backend, targets, (profile(),))
    versions = {"version": "10.3", "cuda": "12.6", "driver": "540.4", "compute_capability": "8.7"}
    return EngineCache().key_for(model, request, BuildHost(**{**versions, **here}))


def test_a_key_has_everything_that_an_engine_depends_on(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    found = key_of(model)
    assert found == key_of(model)
    assert (found.version, found.cuda, found.driver) == ("10.3", "12.6", "540.4")
    assert found.compute_capability == "8.7"
    moved = save_model(tmp_path / "elsewhere" / "m.onnx")
    assert key_digest(key_of(moved)) == key_digest(found)
    digests = {
        key_digest(other)
        for other in (
            found,
            key_of(model, version="10.4"),
            key_of(model, cuda="12.7"),
            key_of(model, driver="550"),
            key_of(model, compute_capability="8.9"),
            key_of(model, backend="tensorrt-rtx"),
            replace(found, request=replace(found.request, profiles=(profile(9),))),
            replace(found, request=replace(found.request, settings=BuildSettings(stripped=True))),
        )
    }
    assert len(digests) == 8


def test_external_data_is_part_of_the_model(tmp_path: Path) -> None:
    first = key_of(save_model(tmp_path / "m.onnx"))
    graph = (tmp_path / "m.onnx").read_bytes()
    second = key_of(save_model(tmp_path / "m.onnx", weight=2.0))
    assert (tmp_path / "m.onnx").read_bytes() == graph
    assert first.model_sha256 != second.model_sha256
    inside = key_of(save_model(tmp_path / "m.onnx", external=False))
    assert inside.model_sha256 not in (first.model_sha256, second.model_sha256)


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_model_that_cannot_be_read_has_no_key(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BackendError, match=r"m\.onnx"):
        key_of(tmp_path / "m.onnx")


def test_a_model_without_its_weights_has_no_key(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    model.with_name("m.onnx.data").unlink()
    with pytest.raises(BackendError, match=r"'m\.onnx\.data' is missing"):
        key_of(model)


def test_a_portable_engine_depends_on_no_gpu_driver_or_cuda(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    there = key_of(model, "12.0", "8.9", backend="tensorrt-rtx", compute_capability="", driver="")
    here = key_of(model, "8.9", "12.0", "8.9", backend="tensorrt-rtx")
    assert there == here
    assert (here.cuda, here.driver, here.compute_capability) == ("", "", "12.0+8.9")
    # One for the GPU at hand does.
    assert key_of(model, backend="tensorrt-rtx").driver == "540.4"


def test_without_any_gpu_there_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compute capability"):
        key_of(save_model(tmp_path / "m.onnx"), compute_capability="")


def test_a_label_has_bundle_role_and_file(tmp_path: Path) -> None:
    model = tmp_path / "clip.mmedge" / "image_encoder" / "fp16.onnx"
    assert model_label(model) == "clip.mmedge/image_encoder/fp16.onnx"
