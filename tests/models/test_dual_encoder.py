"""DualEncoder on a tiny bundle with known outputs, and on fakes that record their calls."""

from __future__ import annotations

import io
import threading
import tracemalloc
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from PIL import Image

import mmedge
from mmedge import ahead
from mmedge.bundle import Bundle
from mmedge.bundle.kinds import ContrastiveHead
from mmedge.errors import (
    BackendError,
    BundleError,
    DTypeError,
    ImageError,
    InputError,
    ShapeError,
    TextError,
)
from mmedge.models import DualEncoder, Skipped, batches
from mmedge.models.batches import text_batches
from mmedge.preprocess import ImageOptions, RawFrame
from mmedge.preprocess.config import AudioConfig, ImageConfig
from mmedge.preprocess.steps import Decode, FitLength, LogMel
from mmedge.runtimes.fake import FakeSession
from mmedge.specs import Array, Modality, TensorSpec

SIZE, DIM = bundles.IMAGE_SIZE, bundles.DIM


@pytest.fixture
def model(tiny_bundle: Bundle) -> Iterator[DualEncoder]:
    with mmedge.load(tiny_bundle.path) as loaded:
        yield loaded


def fake_sessions(function: Any = None) -> dict[str, FakeSession]:
    embedding = TensorSpec("embedding", np.dtype("float32"), ("batch", DIM))
    pixels = TensorSpec("pixel_values", np.dtype("float32"), ("batch", 3, SIZE, SIZE))
    ids = TensorSpec("input_ids", np.dtype("int64"), ("batch", "sequence"))
    return {
        "image_encoder": FakeSession((pixels,), (embedding,), function),
        "text_encoder": FakeSession((ids,), (embedding,)),
    }


def encoder(bundle: Bundle, sessions: dict[str, FakeSession], **options: Any) -> DualEncoder:
    variants = {role: bundle.variant(role) for role in sessions}
    return DualEncoder(bundle, sessions, variants, **options)


def with_manifest(bundle: Bundle, **changes: object) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


def frame(seed: int = 0, height: int = 12, width: int = 10) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected_embedding(model: DualEncoder, image: Array) -> Array:
    return bundles.encode_image(model.image_processor([image])["pixel_values"])


def widths(session: FakeSession) -> list[tuple[int, ...]]:
    return [next(iter(call.values())).shape for call in session.calls]


# One image


def test_one_image_of_any_kind_gives_one_row(model: DualEncoder, tmp_path: Path) -> None:
    pixels = frame()
    image = Image.fromarray(pixels)
    path = tmp_path / "image.png"
    image.save(path)
    expected = expected_embedding(model, pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sources = [
        path,
        str(path),
        np.array([str(path)]),
        np.array([path], object),
        buffer.getvalue(),
        bytearray(buffer.getvalue()),
        buffer,
        image,
        torch.from_numpy(pixels),
        torch.from_numpy(model.image_processor([pixels])["pixel_values"]),
        pixels,
        model.image_processor([pixels])["pixel_values"],
    ]
    for source in sources:
        got = model.encode_image(source)
        assert got.shape == (1, DIM)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_greyscale_and_transparent_arrays_are_images(model: DualEncoder) -> None:
    grey = frame()[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    opaque = np.concatenate([as_rgb, np.full((*grey.shape, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(model.encode_image(grey), model.encode_image(as_rgb))
    np.testing.assert_array_equal(model.encode_image(opaque), model.encode_image(as_rgb))


# Many images


def test_many_images_in_any_container_keep_their_order(model: DualEncoder) -> None:
    images = [frame(seed) for seed in range(7)]
    expected = np.concatenate([model.encode_image(image) for image in images])
    containers = [
        images,
        tuple(images),
        iter(images),
        (image for image in images),
        np.stack(images),
        [Image.fromarray(image) for image in images],
        model.image_processor(images)["pixel_values"],
    ]
    for container in containers:
        np.testing.assert_allclose(model.encode_image(container, batch_size=3), expected, atol=1e-6)


@pytest.mark.parametrize("ready", [False, True])
def test_images_are_split_into_batches(ready: bool, tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    model = encoder(tiny_bundle, sessions)
    images: Any = [frame(seed) for seed in range(20)]
    if ready:
        images = model.image_processor(images)["pixel_values"]
    assert model.encode_image(images).shape == (20, DIM)
    assert [shape[0] for shape in widths(sessions["image_encoder"])] == [8, 8, 4]
    model.encode_image(images, batch_size=20)
    assert widths(sessions["image_encoder"])[-1][0] == 20
    with pytest.raises(InputError, match="batch_size: got 0"):
        model.encode_image(images, batch_size=0)


@pytest.mark.parametrize(
    ("cpus", "device", "further"), [(1, "cpu", 0), (2, "cpu", 1), (2, "cuda", 2)]
)
def test_images_are_read_a_batch_ahead_at_most(
    cpus: int, device: str, further: int, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "allowed_processors", lambda: tuple(range(cpus)))
    sessions = fake_sessions()
    session = sessions["image_encoder"]
    session._placement = replace(session.placement, device=device)
    read_ahead = []

    def images() -> Iterator[Array]:
        for seed in range(40):
            encoded = sum(len(call["pixel_values"]) for call in session.calls)
            read_ahead.append(seed - encoded)
            yield frame(seed)

    assert encoder(tiny_bundle, sessions).encode_image(images(), batch_size=4).shape == (40, DIM)
    assert max(read_ahead) <= 3 + 4 * further


def reused_buffers(seeds: range, folder: Path) -> Iterator[Any]:
    """Yield images of every kind that are overwritten or closed when the next one is asked for."""
    buffer = np.empty((60, 50, 3), np.uint8)
    for seed in seeds:
        buffer[:] = frame(seed, 60, 50)
        encoded = io.BytesIO()
        Image.fromarray(buffer).save(encoded, "PNG")
        path = folder / f"{seed}.png"
        path.write_bytes(encoded.getvalue())
        kind = seed % 7
        if kind == 0:
            yield buffer
        elif kind == 1:
            yield torch.from_numpy(buffer)
        elif kind == 2:
            with path.open("rb") as file:
                yield file
        elif kind == 3:
            with Image.open(path) as image:
                yield image
            image.close()
        elif kind == 4:
            data = bytearray(encoded.getvalue())
            yield data
            data[:] = bytes(len(data))
        elif kind == 5:
            yield path
            path.unlink()
        else:
            yield RawFrame(buffer, "rgb", 50, 60)
        buffer[:] = 0


@pytest.mark.parametrize("cpus", [1, 4])
def test_images_may_be_overwritten_once_the_next_is_read(
    cpus: int, model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "allowed_processors", lambda: tuple(range(cpus)))
    expected = model.encode_image([frame(seed, 60, 50) for seed in range(30)], batch_size=4)
    got = model.encode_image(reused_buffers(range(30), tmp_path), batch_size=4)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    file = io.BytesIO()
    Image.fromarray(frame(0, 60, 50)).save(file, "PNG")
    same = model.encode_image([file, file, Image.open(file), file] * 4, batch_size=4)
    np.testing.assert_allclose(same, expected[[0] * 16], atol=1e-6)


def test_engine_that_fails_leaves_no_thread(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def fail(feed: Any) -> Any:
        raise BackendError("out of memory")

    model = encoder(tiny_bundle, fake_sessions(fail))
    with pytest.raises(BackendError) as caught:
        model.encode_image_files(write_files(tmp_path, 30, set()), batch_size=2)
    assert caught.value.__traceback__ is not None  # whose frames hold what they were working with
    assert [t for t in threading.enumerate() if t.name.startswith("mmedge-prepare")] == []


def test_memory_does_not_grow_with_the_number_of_images(model: DualEncoder) -> None:
    def peak_bytes(count: int) -> int:
        tracemalloc.start()
        try:
            embeddings = model.encode_image(frame(seed, 120, 120) for seed in range(count))
            assert embeddings.shape == (count, DIM)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(16)  # whatever is made once
    assert peak_bytes(320) < peak_bytes(16) + 320 * 1000  # a frame is 43,200 bytes


def test_batches_overwrite_one_buffer_and_not_the_outputs(model: DualEncoder) -> None:
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    red = white * np.array([1, 0, 0], np.uint8)
    got = model.encode_image([black, white, red], batch_size=1)
    expected = np.concatenate([expected_embedding(model, p) for p in (black, white, red)])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_model_without_a_common_size_takes_images_one_by_one(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    image = manifest.processors["image"]
    assert isinstance(image, ImageConfig)
    free = ImageConfig(steps=(Decode(), *image.steps[3:]))
    processors = {**manifest.processors, "image": free}
    sessions = fake_sessions()
    pixels = TensorSpec("pixel_values", np.dtype("float32"), ("batch", 3, "height", "width"))
    sessions["image_encoder"] = FakeSession((pixels,), sessions["image_encoder"].outputs)
    model = encoder(with_manifest(tiny_bundle, processors=processors), sessions)
    assert model.encode_image([frame(0, 5, 6), frame(1, 7, 8)]).shape == (2, DIM)
    assert widths(sessions["image_encoder"]) == [(1, 3, 5, 6), (1, 3, 7, 8)]


def test_graph_of_a_fixed_batch_is_fed_batches_of_that_size(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    pixels = TensorSpec("pixel_values", np.dtype("float32"), (1, 3, SIZE, SIZE))
    embedding = TensorSpec("embedding", np.dtype("float32"), (1, DIM))
    sessions["image_encoder"] = FakeSession((pixels,), (embedding,))
    model = encoder(tiny_bundle, sessions)
    assert model.encode_image([frame(0), frame(1)]).shape == (2, DIM)


def test_an_fp16_graph_takes_and_returns_float32(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    pixels = TensorSpec("pixel_values", np.dtype("float16"), ("batch", 3, SIZE, SIZE))
    embedding = TensorSpec("embedding", np.dtype("float16"), ("batch", DIM))
    sessions["image_encoder"] = FakeSession((pixels,), (embedding,))
    assert encoder(tiny_bundle, sessions).encode_image(frame()).dtype == np.float32


def test_boxes_of_one_image_are_encoded_without_decoding_it_again(
    model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frame(5, 60, 50)
    path = tmp_path / "whole.png"
    Image.fromarray(whole).save(path)
    boxes = np.array([[0, 0, 50, 60], [10, 20, 30, 25], [-4.5, 30.5, 9.2, 90], [1, 1, 2, 2]])
    parts = [whole, whole[20:25, 10:30], whole[30:, :10], whole[1:2, 1:2]]
    expected = np.concatenate([model.encode_image(part) for part in parts])
    opened = []
    real_open = Path.open

    def count(self: Path, *args: Any) -> Any:
        opened.append(self)
        return real_open(self, *args)

    monkeypatch.setattr(Path, "open", count)
    np.testing.assert_allclose(model.encode_boxes(path, boxes, batch_size=3), expected, atol=1e-6)
    assert opened.count(path) == 1
    bgr = np.ascontiguousarray(whole[..., ::-1])
    got = model.encode_boxes(bgr, boxes.tolist(), channels="bgr")
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert model.encode_boxes(whole, np.empty((0, 4))).shape == (0, DIM)
    with pytest.raises(InputError, match=r"boxes\[1\]: .* outside the image of 50x60"):
        model.encode_boxes(whole, [[0, 0, 9, 9], [60, 0, 70, 9]])


def test_boxes_of_an_image_that_is_too_large_are_not_those_of_a_smaller_one(
    model: DualEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    Image.fromarray(frame(5, 400, 400)).save(path)
    assert model.encode_image(path, max_pixels=90_000).shape == (1, DIM)
    with pytest.raises(ImageError, match="400x400 pixels, more than the 90000 allowed"):
        model.encode_boxes(path, [[0, 0, 9, 9]], max_pixels=90_000)


# Bad images


def test_bad_image_among_many_is_named(model: DualEncoder) -> None:
    with pytest.raises(ImageError, match=r"^images\[2\]: Image 'gone\.png': no such file"):
        model.encode_image([frame(), frame(), "gone.png"], batch_size=2)
    with pytest.raises(DTypeError, match=r"^images\[1\]: .*expected uint8"):
        model.encode_image([frame(), frame().astype(np.float32)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ready_tensor_must_be_finite(value: float, model: DualEncoder) -> None:
    tensor = np.zeros((3, 3, SIZE, SIZE), np.float32)
    tensor[1, 0, 0, 0] = value
    with pytest.raises(ImageError, match=r"Images \[1\]: NaN or infinite"):
        model.encode_image(tensor)


def test_ready_tensor_of_another_dtype_or_shape(model: DualEncoder) -> None:
    with pytest.raises(DTypeError, match="got dtype float64, expected float32"):
        model.encode_image(np.zeros((1, 3, SIZE, SIZE)))
    with pytest.raises(ShapeError, match="pixel_values"):
        model.encode_image(np.zeros((1, 3, SIZE, SIZE + 1), np.float32))
    with pytest.raises(ShapeError, match="pixel_values"):
        model.encode_image(np.zeros((0, 3, SIZE, SIZE), np.float32))
    with pytest.raises(DTypeError, match="four axes"):
        model.encode_image(np.zeros((3, SIZE, SIZE), np.float32))


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.zeros((0, 8, 8, 3), np.uint8)])
def test_no_image_is_an_error(nothing: Any, model: DualEncoder) -> None:
    with pytest.raises(InputError, match="Images: got none"):
        model.encode_image(nothing)


def test_other_types_are_an_error(model: DualEncoder) -> None:
    with pytest.raises(InputError, match="Images: got int"):
        model.encode_image(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"images\[0\]: Image of type NoneType: not an image"):
        model.encode_image([None])  # type: ignore[list-item]


def write_files(folder: Path, count: int, bad: set[int]) -> list[Path]:
    paths = [folder / f"{index:03}.png" for index in range(count)]
    for index, path in enumerate(paths):
        if index in bad:
            path.write_bytes(b"not an image")
        else:
            Image.fromarray(frame(index)).save(path)
    return paths


def test_bad_files_are_skipped_and_reported_on_request(model: DualEncoder, tmp_path: Path) -> None:
    paths = write_files(tmp_path, 21, bad={0, 10, 20})
    with pytest.raises(ImageError, match=r"images\[0\]: Image '.*000\.png': not an image"):
        model.encode_image_files(paths)
    encoded = model.encode_image_files(iter(paths), skip_bad=True, batch_size=4)
    good = [path for index, path in enumerate(paths) if index not in {0, 10, 20}]
    assert encoded.paths == tuple(map(str, good))
    np.testing.assert_allclose(encoded.embeddings, model.encode_image(good), atol=1e-6)
    assert [(image.position, image.path) for image in encoded.skipped] == [
        (index, str(paths[index])) for index in (0, 10, 20)
    ]
    assert all("not an image" in image.reason for image in encoded.skipped)


def test_files_that_are_all_bad_or_none_give_no_embeddings(
    model: DualEncoder, tmp_path: Path
) -> None:
    encoded = model.encode_image_files(write_files(tmp_path, 3, {0, 1, 2}), skip_bad=True)
    assert encoded.embeddings.shape == (0, DIM)
    assert encoded.paths == ()
    assert len(encoded.skipped) == 3
    assert model.encode_image_files([]).embeddings.shape == (0, DIM)


def test_a_folder_of_files_is_encoded_and_named(model: DualEncoder, tmp_path: Path) -> None:
    paths = write_files(tmp_path, 3, {1})
    encoded = model.encode_image_files(tmp_path, skip_bad=True)
    assert encoded.paths == (str(paths[0]), str(paths[2]))
    assert [image.path for image in encoded.skipped] == [str(paths[1])]
    with pytest.raises(ImageError, match=r"is a folder\. Pass it to encode_image_files"):
        model.encode_image(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image files"):
        model.encode_image_files(str(tmp_path / "empty"))


def test_images_are_skipped_on_request(model: DualEncoder) -> None:
    skipped: list[Skipped] = []
    got = model.encode_image([frame(0), b"no", frame(1)], skipped=skipped)
    np.testing.assert_allclose(got, model.encode_image([frame(0), frame(1)]), atol=1e-6)
    assert [(image.position, image.path) for image in skipped] == [(1, "")]
    assert "not an image" in skipped[0].reason
    assert model.encode_image(b"no", skipped=skipped).shape == (0, DIM)
    with pytest.raises(InputError, match="got none"):
        model.encode_image([], skipped=[])


def test_channels_and_limits_are_taken_at_load_and_per_call(tiny_bundle: Bundle) -> None:
    bgr = np.ascontiguousarray(frame()[..., ::-1])
    plain, loaded = encoder(tiny_bundle, fake_sessions()), encoder(tiny_bundle, fake_sessions())
    options = ImageOptions(channels="bgr", max_pixels=200)
    turned = encoder(tiny_bundle, fake_sessions())
    turned.opened(options, lambda: turned)
    expected = plain.encode_image(frame())
    np.testing.assert_array_equal(turned.encode_image(bgr), expected)
    np.testing.assert_array_equal(turned.encode_image([bgr, bgr])[1:], expected)
    np.testing.assert_array_equal(turned.encode_image(frame(), channels="rgb"), expected)
    np.testing.assert_array_equal(loaded.encode_image(bgr, channels="bgr"), expected)
    file = io.BytesIO()
    Image.fromarray(frame(0, 20, 20)).save(file, "PNG")
    with pytest.raises(ImageError, match="more than the 200 allowed"):
        turned.encode_image(file)
    assert turned.encode_image(file, max_pixels=400).shape == (1, DIM)
    with pytest.raises(InputError, match="channels"):
        plain.encode_image(frame(), channels="rbg")  # type: ignore[arg-type]


def test_files_must_be_paths(model: DualEncoder) -> None:
    with pytest.raises(InputError, match=r"expected a folder or several\. Pass \[path\]"):
        model.encode_image_files("a.png")
    with pytest.raises(InputError, match="got ndarray at position 0"):
        model.encode_image_files([frame()], skip_bad=True)  # type: ignore[list-item]


# Texts


@pytest.mark.parametrize(
    "several",
    [
        lambda texts: (text for text in texts),
        np.array,
        lambda texts: np.array(texts, object),
        lambda texts: dict.fromkeys(texts).keys(),
    ],
)
def test_texts_of_every_collection_are_taken(several: Any, model: DualEncoder) -> None:
    texts = ["red", "a photo of", "blue circle"]
    np.testing.assert_array_equal(model.encode_text(several(texts)), model.encode_text(texts))


def test_texts_are_skipped_on_request(model: DualEncoder) -> None:
    skipped: list[Skipped] = []
    captions = iter(["red", "", "blue circle", None, float("nan"), "\ud800"])
    got = model.encode_text(captions, skipped=skipped)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, model.encode_text(["red", "blue circle"]), atol=1e-6)
    assert [text.position for text in skipped] == [1, 3, 4, 5]
    assert skipped[0].reason.startswith("Text 1: empty")
    assert model.encode_text([""], skipped=skipped).shape == (0, DIM)
    with pytest.raises(TextError, match="got none"):
        model.encode_text(iter([]), skipped=[])


def test_a_text_without_a_known_token_is_skipped_too(model: DualEncoder) -> None:
    processor = model.text_processor
    known = processor.encode

    def encode(texts: list[str]) -> list[list[int]]:
        return [[] if text == "odd" else ids for text, ids in zip(texts, known(texts), strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "encode", encode)
        skipped: list[Skipped] = []
        got = model.encode_text(["", "red", "odd", "blue"], skipped=skipped)
        assert sorted(text.position for text in skipped) == [0, 2]
        with pytest.raises(TextError, match="Text 1: the tokenizer knows no part of it"):
            model.encode_text(["red", "odd"])
    np.testing.assert_allclose(got, model.encode_text(["red", "blue"]), atol=1e-6)


def test_a_stream_of_texts_is_encoded_part_by_part(
    model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_TEXTS_AT_ONCE", 4)
    texts = ["red", "a photo of", "blue circle", "green", "a"] * 3
    got = model.encode_text(iter(texts))
    np.testing.assert_allclose(got, model.encode_text(texts[:5] * 3), atol=1e-6)
    with pytest.raises(TextError, match="Text 9: empty"):
        model.encode_text([*texts[:9], " "])


def test_texts_keep_their_order_and_embeddings(model: DualEncoder) -> None:
    texts = ["red", "a photo of", "blue circle", "green", "a", "square red"] * 3
    expected = np.concatenate([model.encode_text(text) for text in texts])
    assert expected.shape == (18, DIM)
    for batch_size in (1, 2, 5, None):
        got = model.encode_text(texts, batch_size=batch_size)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)
    ids = model.text_processor(["blue circle"])["input_ids"]
    np.testing.assert_allclose(expected[2:3], bundles.encode_text(ids), atol=1e-6)


def long_text_bundle(bundle: Bundle, padding: str) -> Bundle:
    text = bundle.manifest.processors["text"]
    longer = text.model_copy(update={"max_length": 40, "padding": padding})
    return with_manifest(bundle, processors={**bundle.manifest.processors, "text": longer})


def with_head(bundle: Bundle, head: ContrastiveHead | None) -> Bundle:
    return with_manifest(
        bundle, kind=bundle.manifest.kind.model_copy(update={"contrastive_head": head})
    )


def test_short_texts_are_not_padded_to_long_ones(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    model = encoder(long_text_bundle(tiny_bundle, "longest"), sessions)
    long = " ".join(["red"] * 30)
    model.encode_text(["red", long, "blue", long, "green", long], batch_size=2)
    assert widths(sessions["text_encoder"]) == [(2, 3), (1, 3), (2, 32), (1, 32)]
    # A text that runs among others is fed as it is fed alone.
    calls = [call["input_ids"] for call in sessions["text_encoder"].calls]
    np.testing.assert_array_equal(calls[0], model.text_processor(["red", "blue"])["input_ids"])


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_buckets_take_every_text_once_and_pad_little(batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(6, 41, 100).tolist()
    groups = text_batches([[0] * length for length in lengths], batch_size, by_length=True)
    assert sorted(position for group in groups for position in group) == list(range(100))
    assert max(map(len, groups)) <= batch_size
    fed = 0
    for group in groups:
        longest = max(lengths[position] for position in group)
        assert longest - min(lengths[position] for position in group) <= 3
        fed += longest * len(group)
    assert fed <= 1.08 * sum(lengths)  # padded to the longest it would be 1.7 times


def test_texts_of_a_padded_model_run_in_their_order(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    model = encoder(long_text_bundle(tiny_bundle, "max_length"), sessions)
    model.encode_text(["red", " ".join(["red"] * 30), "blue"], batch_size=2)
    assert widths(sessions["text_encoder"]) == [(2, 40), (1, 40)]


def test_bad_text_is_named(model: DualEncoder) -> None:
    with pytest.raises(TextError, match="Text 1: empty"):
        model.encode_text(["red", " "])
    with pytest.raises(TextError, match="got none"):
        model.encode_text([])
    with pytest.raises(TextError, match="expected several str"):
        model.encode_text(3)  # type: ignore[arg-type]


# Sounds


def test_sounds_of_every_kind_are_encoded(tiny_bundle: Bundle) -> None:
    log_mel = LogMel(
        fft_size=512,
        hop=160,
        mels=8,
        min_hz=0,
        max_hz=8000,
        scale="htk",
        norm=None,
        log="db",
    )
    length = FitLength(samples=3200, pad="zeros", truncate="first")
    sounds = AudioConfig(input="pixel_values", sampling_rate=16_000, steps=(length, log_mel))
    kind = tiny_bundle.manifest.kind.model_copy(
        update={"encoders": {Modality.AUDIO: "image_encoder"}}
    )
    bundle = with_manifest(tiny_bundle, processors={"image": sounds}, kind=kind)
    features = TensorSpec("pixel_values", np.dtype("float32"), ("batch", 1, 21, 8))
    embedding = TensorSpec("embedding", np.dtype("float32"), ("batch", DIM))
    session = FakeSession((features,), (embedding,))
    model = encoder(bundle, {"image_encoder": session})
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(bytes(6400))
    samples = (np.zeros(3200, np.int16), 16_000)
    for source in (file, file.getvalue(), bytearray(file.getvalue()), samples):
        assert model.encode_audio(source).shape == (1, DIM)
    assert model.encode_audio(iter([samples] * 3), batch_size=2).shape == (3, DIM)
    with pytest.raises(InputError, match="does not say its sampling rate"):
        model.encode_audio(samples[0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got none"):
        model.encode_audio([])


# Similarity and classification


def test_similarity_takes_inputs_or_their_embeddings(model: DualEncoder) -> None:
    frames, texts = [frame(0), frame(1)], ["red", "green", "blue"]
    images, words = model.encode_image(frames), model.encode_text(texts)
    expected = images @ words.T
    assert expected.shape == (2, 3)
    assert np.abs(expected).max() <= 1 + 1e-6
    np.testing.assert_allclose(model.similarity(frames, texts), expected, atol=1e-6)
    np.testing.assert_allclose(model.similarity(images, texts), expected, atol=1e-6)
    np.testing.assert_allclose(model.similarity(frames, words), expected, atol=1e-6)
    np.testing.assert_allclose(model.similarity(frame(0), "red"), expected[:1, :1], atol=1e-6)


def test_embeddings_of_another_shape_or_dtype(model: DualEncoder) -> None:
    good = model.encode_text("red")
    with pytest.raises(ShapeError, match=rf"expected \(batch, {DIM}\)"):
        model.similarity(good[:, :-1], good)
    with pytest.raises(ShapeError, match=rf"expected \(batch, {DIM}\)"):
        model.similarity(good, good[0])
    with pytest.raises(DTypeError, match="expected float32"):
        model.similarity(good, good.astype(np.float64))


def test_classification_is_a_scaled_softmax(model: DualEncoder) -> None:
    labels = ["red", "green circle", "blue square"]
    result = model.classify([frame(0), frame(1)], labels, template="a {}")
    logits = 20.0 * model.similarity([frame(0), frame(1)], [f"a {label}" for label in labels])
    powers = np.exp(logits.astype(np.float64))
    assert result.labels == tuple(labels)
    assert result.probabilities.dtype == np.float32
    np.testing.assert_allclose(
        result.probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4
    )
    best, second = result.top(2)[0]
    assert best.label == labels[int(result.probabilities[0].argmax())]
    assert best.probability == pytest.approx(float(result.probabilities[0].max()))
    assert best.probability >= second.probability
    assert [len(row) for row in result.top(99)] == [3, 3]
    with pytest.raises(InputError, match="k: got 0"):
        result.top(0)


def test_classification_by_sigmoid_has_scale_and_bias(tiny_bundle: Bundle) -> None:
    head = ContrastiveHead(activation="sigmoid", logit_scale=100.0, logit_bias=-10.0)
    with mmedge.load(tiny_bundle.path) as loaded:
        model = DualEncoder(with_head(tiny_bundle, head), loaded.sessions, loaded.variants)
        labels = ["red", "green", "blue"]
        result = model.classify(frame(0), labels, template="{}")
        logits = 100.0 * model.similarity(frame(0), labels).astype(np.float64) - 10
    np.testing.assert_allclose(result.probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_classify_takes_embeddings_and_label_banks(model: DualEncoder) -> None:
    banked = model.classify(frame(0), "colours", template="{}")
    assert banked.labels == ("red", "green", "blue")
    listed = model.classify(model.encode_image(frame(0)), list(banked.labels), template="{}")
    np.testing.assert_allclose(banked.probabilities, listed.probabilities, atol=1e-6)
    with pytest.raises(InputError, match=r"'animals' is not a label bank.*\['colours'\]"):
        model.classify(frame(0), "animals")


def test_label_embeddings_are_cached_for_the_last_sets(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    model = encoder(tiny_bundle, sessions)
    calls = sessions["text_encoder"].calls
    first = model.classify(frame(), ["red", "green"], template="{}")
    again = model.classify(frame(), ["red", "green"], template="{}")
    assert len(calls) == 1
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    model.classify(frame(), ["green", "red"], template="{}")
    model.classify(frame(), ["red", "green"], template="a {}")
    assert len(calls) == 3  # another order or template is another set
    for index in range(8):
        model.classify(frame(), [f"red {index}"], template="{}")
    model.classify(frame(), ["red", "green"], template="{}")
    assert len(calls) == 12  # the first set had to make room


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        (["red"], "a photo", "has no placeholder for the label"),
        ([], "{}", "Labels: got none"),
        (["red", "red"], "{}", r"more than once: \['red'\]"),
        (["red", " "], "{}", "Label 1: got ' '"),
        (["red", 3], "{}", "Label 1: got 3"),
    ],
)
def test_bad_labels_are_explained(
    labels: Any, template: str, message: str, model: DualEncoder
) -> None:
    with pytest.raises(InputError, match=message):
        model.classify(frame(), labels, template=template)


def test_model_without_a_head_does_not_classify(tiny_bundle: Bundle) -> None:
    model = encoder(with_head(tiny_bundle, None), fake_sessions())
    with pytest.raises(BundleError, match="no contrastive head"):
        model.classify(frame(), ["red"])


# The model itself


def test_role_that_was_not_loaded_is_explained(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    images_only = encoder(tiny_bundle, {"image_encoder": sessions["image_encoder"]})
    with pytest.raises(InputError, match="text_encoder was not loaded"):
        images_only.encode_text("red")
    texts_only = encoder(tiny_bundle, {"text_encoder": sessions["text_encoder"]})
    with pytest.raises(InputError, match="image_encoder was not loaded"):
        texts_only.encode_image(frame())
    roles = {"text_encoder": tiny_bundle.manifest.roles["text_encoder"]}
    bundle = with_manifest(tiny_bundle, roles=roles)
    with pytest.raises(InputError, match=r"holds no image_encoder, only \['text_encoder'\]"):
        encoder(bundle, {"text_encoder": sessions["text_encoder"]}).encode_image_files(["a.png"])


def test_attributes(model: DualEncoder, tiny_bundle: Bundle) -> None:
    assert model.bundle == tiny_bundle
    assert model.manifest.name == "tiny"
    assert model.embedding_dim == DIM
    assert model.spaces == {"image_encoder": "tiny-0001", "text_encoder": "tiny-0001"}
    assert model.space == "tiny-0001"
    assert model.variants["image_encoder"].name == "fp32"
    assert repr(model) == (
        "<DualEncoder tiny: image_encoder=fp32 in onnxruntime on cpu, "
        "text_encoder=fp32 in onnxruntime on cpu>"
    )


def test_space_is_none_where_the_roles_differ(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    variants = {role: tiny_bundle.variant(role) for role in sessions}
    variants["text_encoder"] = variants["text_encoder"].model_copy(update={"space": "other"})
    assert DualEncoder(tiny_bundle, sessions, variants).space is None


def test_a_closed_model_refuses(tiny_bundle: Bundle) -> None:
    with mmedge.load(tiny_bundle.path) as model:
        model.encode_image(frame())
    model.close()
    with pytest.raises(BackendError, match="closed"):
        model.encode_image(frame())
    with pytest.raises(BackendError, match="closed"):
        model.encode_text("red")


def test_error_of_the_engine_passes_through(tiny_bundle: Bundle) -> None:
    sessions = fake_sessions()
    specs = sessions["image_encoder"]
    sessions["image_encoder"] = FakeSession(
        specs.inputs, specs.outputs, failures=[None, BackendError("out of memory")]
    )
    with pytest.raises(BackendError, match="out of memory"):
        encoder(tiny_bundle, sessions).encode_image([frame()] * 3, batch_size=1)


def test_threads_share_a_model(model: DualEncoder) -> None:
    frames = [frame(seed) for seed in range(12)]
    texts = ["red", "a photo of", "blue circle", "green square", "a", "of"] * 2
    images, words = model.encode_image(frames), model.encode_text(texts)

    def work(index: int) -> tuple[Array, Array, Array]:
        start = index % 6
        labels = [texts[start], "photo"]
        return (
            model.encode_image(frames[start : start + 5], batch_size=2),
            model.encode_text(texts[start : start + 5], batch_size=2),
            model.classify(frames[start], labels, template="{}").probabilities,
        )

    alone = [work(index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(work, range(60)))
    for index, (got_images, got_words, scores) in enumerate(together):
        start = index % 6
        np.testing.assert_allclose(got_images, images[start : start + 5], atol=1e-6)
        np.testing.assert_allclose(got_words, words[start : start + 5], atol=1e-6)
        np.testing.assert_allclose(scores, alone[start][2], atol=1e-6)
