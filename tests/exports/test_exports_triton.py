"""A Triton repository: valid by the protocol's schema, with mmedge's outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import edit_manifest
from fake_triton import Repository, backend_utils, load_repository, load_worker
from PIL import Image

import mmedge
from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import InputError, StorageError
from mmedge.exports import export_triton, select
from mmedge.exports.engine_folder import SuppliedEngine
from mmedge.exports.triton_configs import Device
from mmedge.runtimes.engines.spec import EngineKey, EngineRequest, ShapeProfile, ShapeRange
from mmedge.specs import Array

PLATFORMS = {
    "image_encoder": "onnxruntime_onnx",
    "image_encoder_preprocessing": "python",
    "encode_image": "ensemble",
    "text_encoder": "onnxruntime_onnx",
    "text_encoder_preprocessing": "python",
    "encode_text": "ensemble",
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def repository(tiny_bundle: Bundle, out: Path) -> Repository:
    models = export_triton(tiny_bundle, out, select(tiny_bundle))
    assert {model.name: model.platform for model in models} == PLATFORMS
    return load_repository(out)


def frames(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 31, 3), dtype=np.uint8)


def png(frame: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def strings(*values: bytes) -> Array:
    return np.array([[value] for value in values], np.object_)


def engine(flavour: str = "tensorrt") -> SuppliedEngine:
    ranges = {"pixel_values": ShapeRange((1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 8, 8))}
    request = EngineRequest(flavour, (), (ShapeProfile(ranges),))  # type: ignore[arg-type]
    return SuppliedEngine(b"a plan", EngineKey("0" * 64, request, "10.3", "12.6", "540", "8.7"))


def test_images_and_frames_give_mmedge_s_embeddings(
    repository: Repository, tiny_bundle: Bundle
) -> None:
    images = frames(3)
    with mmedge.load(tiny_bundle.path) as model:
        expected = model.encode_image(images)
    files = strings(*(png(frame) for frame in images))
    for output in (
        repository.infer("encode_image", image=files),
        repository.infer("encode_image", frame=images),
    ):
        assert list(output) == ["embedding"]
        np.testing.assert_allclose(output["embedding"], expected, atol=1e-6)


def test_texts_give_mmedge_s_embeddings(repository: Repository, tiny_bundle: Bundle) -> None:
    texts = ["a red circle", "a photo of a green square"]
    with mmedge.load(tiny_bundle.path) as model:
        expected = model.encode_text(texts)
    output = repository.infer("encode_text", text=strings(*(text.encode() for text in texts)))
    np.testing.assert_allclose(output["embedding"], expected, atol=1e-6)


def test_texts_of_like_length_get_one_shape(tiny_bundle: Bundle, out: Path) -> None:
    """Triton joins requests of one shape alone."""
    edit_manifest(tiny_bundle.path, "processors", "text", "max_length", value=20)
    bundle = open_bundle(tiny_bundle.path)
    export_triton(bundle, out, select(bundle))
    repository = load_repository(out)

    def shape(words: int) -> tuple[int, ...]:
        text = " ".join(["red"] * words).encode()
        output = repository.infer("text_encoder_preprocessing", text=strings(text))
        return output["input_ids"].shape

    assert [shape(words) for words in (1, 6, 7, 14, 15, 40)] == [
        (1, 8), (1, 8), (1, 16), (1, 16), (1, 20), (1, 20),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("encode_image", {"image": strings(b"nothing")}, "not an image"),
        ("encode_image", {"image": strings(png(frames(1)[0])), "frame": frames(1)}, "Got both"),
        ("encode_text", {"text": strings(b"\xff\xfe")}, "not UTF-8"),
        ("encode_text", {"text": strings(b"red", b" ")}, "Text 1: empty"),
    ],
)
def test_an_unusable_item_is_an_error_of_its_request(
    repository: Repository, model: str, inputs: dict[str, Array], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        repository.infer(model, **inputs)


def test_a_bad_request_does_not_spoil_the_others(repository: Repository) -> None:
    name = "text_encoder_preprocessing"
    with backend_utils() as utils:
        worker = load_worker(repository.path / name / "1", repository.configs[name])
        requests = [utils.Request({"text": strings(text)}) for text in (b"red", b"", b"green")]
        responses = worker.execute(requests)
    assert [response.error is None for response in responses] == [True, False, True]


def test_dynamic_batching_and_warmup(repository: Repository) -> None:
    image = repository.configs["image_encoder"]
    assert image.max_batch_size == 8
    assert list(image.dynamic_batching.preferred_batch_size) == [4, 8]
    assert image.HasField("dynamic_batching")
    assert repository.configs["text_encoder"].max_batch_size == 32
    assert [warmup.batch_size for warmup in image.model_warmup] == [1]
    assert not image.instance_group  # left to the server


@pytest.mark.parametrize(("device", "kind"), [("cpu", 2), ("cuda", 1)])
def test_a_device_is_a_kind_of_instance(
    tiny_bundle: Bundle, out: Path, device: Device, kind: int
) -> None:
    export_triton(tiny_bundle, out, select(tiny_bundle), device=device)
    (group,) = load_repository(out).configs["image_encoder"].instance_group
    assert group.kind == kind


def test_external_data_lies_beside_its_model(bundle_with_data: Bundle, out: Path) -> None:
    export_triton(bundle_with_data, out, select(bundle_with_data))
    assert (out / "image_encoder/1/fp32.onnx.data").is_file()
    output = load_repository(out).infer("encode_image", frame=frames(1))
    with mmedge.load(bundle_with_data.path) as model:
        np.testing.assert_allclose(output["embedding"], model.encode_image(frames(1)), atol=1e-6)


def test_a_fixed_batch_is_part_of_the_shape(tiny_bundle: Bundle, out: Path) -> None:
    for side in ("inputs", "outputs"):
        for role in ("image_encoder", "text_encoder"):
            place = ("roles", role, side, 0, "shape", 0)
            edit_manifest(tiny_bundle.path, *place, value=2)
    bundle = open_bundle(tiny_bundle.path)
    export_triton(bundle, out, select(bundle))
    config = load_repository(out).configs["image_encoder"]
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 3, 8, 8]
    assert not config.HasField("dynamic_batching")


def test_an_engine_runs_as_a_plan_within_its_profile(tiny_bundle: Bundle, out: Path) -> None:
    models = export_triton(
        tiny_bundle, out, select(tiny_bundle), engines={"image_encoder": engine()}
    )
    assert models[0].platform == "tensorrt_plan"
    repository = load_repository(out)
    config = repository.configs["image_encoder"]
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 5)
    assert config.instance_group[0].kind == 1
    assert (out / "image_encoder/1/model.plan").read_bytes() == b"a plan"
    assert repository.configs["encode_image"].max_batch_size == 5
    assert repository.configs["text_encoder"].platform == "onnxruntime_onnx"


def test_engines_of_rtx_are_not_for_triton(tiny_bundle: Bundle, out: Path) -> None:
    with pytest.raises(InputError, match="Triton runs engines of TensorRT, got one of"):
        export_triton(
            tiny_bundle,
            out,
            select(tiny_bundle),
            engines={"image_encoder": engine("tensorrt-rtx")},
        )


def test_one_variant_of_a_role(tiny_bundle: Bundle, out: Path) -> None:
    with pytest.raises(InputError, match="one variant of a role"):
        export_triton(tiny_bundle, out, select(tiny_bundle, precisions=["fp32", "int8"]))
    assert not out.exists()


@pytest.mark.parametrize(("precision", "level"), [("fp32", 1), ("fp16", 1), ("int8", -1)])
def test_a_graph_with_float16_is_rewritten_less(
    bundle_with_half: Bundle, out: Path, precision: str, level: int
) -> None:
    """What runtimes/ort/session.py does for the same reason, in Triton's numbers."""
    steps = ("roles", "image_encoder", "variants", 0, "precision")
    edit_manifest(bundle_with_half.path, *steps, value=precision)
    bundle = open_bundle(bundle_with_half.path)
    export_triton(bundle, out, select(bundle, precisions=["fp32"]))
    configs = load_repository(out).configs
    assert configs["image_encoder"].optimization.graph.level == level
    assert not configs["text_encoder"].HasField("optimization")


def test_without_preprocessing_there_is_no_ensemble(tiny_bundle: Bundle, out: Path) -> None:
    roles = tiny_bundle.manifest.model_dump(mode="json")["roles"]
    roles = {"image_encoder": roles["image_encoder"]}
    roles["image_encoder"]["inputs"][0]["feed"] = {"caller": True}
    edit_manifest(tiny_bundle.path, "roles", value=roles)
    edit_manifest(tiny_bundle.path, "tasks", value=[])
    edit_manifest(tiny_bundle.path, "kind", value={"type": "module", "role": "image_encoder"})
    bundle = open_bundle(tiny_bundle.path)
    models = export_triton(bundle, out, select(bundle, roles=["image_encoder"]))
    assert [model.name for model in models] == ["image_encoder"]


def test_replacing(tiny_bundle: Bundle, out: Path) -> None:
    chosen = select(tiny_bundle)
    export_triton(tiny_bundle, out, chosen)
    with pytest.raises(StorageError, match="--overwrite"):
        export_triton(tiny_bundle, out, chosen)
    export_triton(tiny_bundle, out, select(tiny_bundle, roles=["text_encoder"]), overwrite=True)
    assert not (out / "image_encoder").exists()
    marker: dict[str, Any] = json.loads((out / "mmedge-export.json").read_text("utf-8"))
    assert marker["variants"] == {"text_encoder": "fp32"}
