from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import write_images
from roles import role

from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.checks import Data, check_dataset, load_data
from mmedge.converters.data.datasets import Dataset, Sample, read_dataset
from mmedge.converters.data.feeds import Samples, missing_data, role_feeds
from mmedge.converters.request import read_data
from mmedge.errors import CalibrationError
from mmedge.preprocess import ImageConfig, ImageProcessor
from mmedge.preprocess.steps import Decode, Rescale, Resize
from mmedge.specs import Array, Modality, TensorSpec

PROCESSOR = ImageProcessor(
    ImageConfig(
        steps=(
            Decode(),
            Resize(mode="exact", height=8, width=8, resample="bilinear"),
            Rescale(factor=1 / 255),
        )
    )
)


def test_a_plain_folder_is_read_below_and_sorted(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2, 0)
    write_images(tmp_path / "a", 1, 1)
    (tmp_path / "notes.txt").write_text("not an image")
    names = [s.image.relative_to(tmp_path).as_posix() for s in read_dataset(tmp_path).samples]
    assert names == ["a/000.png", "b/000.png", "b/001.png"]


def test_captions_and_labels_are_read_from_the_folder_or_the_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3, 0, captions=True)
    data = read_dataset(folder)
    assert data.samples == read_dataset(folder / "captions.jsonl").samples
    assert data.samples[1] == Sample(
        folder / "001.png", None, "image 1 of a green square", "green square"
    )
    assert data.captions[0] == "image 0 of a red circle"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[]", r"got \[\], expected an object with 'image', 'audio' or 'video'"),
        ('{"label": "x"}', "got fields label, expected an object with 'image', 'audio' or 'video'"),
        ('{"image": "a.png", "captoin": "x"}', "unknown field 'captoin'"),
        ('{"image": "a.png", "label": 3}', "'label' is int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.png"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=reason) as caught:
        read_dataset(tmp_path)
    assert f"{path}, line 2" in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(b'{"image": "\xff.png"}\n')
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_dataset(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="No such folder or file"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match="holds no images, sounds or videos"):
        read_dataset(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(CalibrationError, match=r"a \.jsonl file"):
        read_dataset(tmp_path / "x.csv")


def test_data_of_another_kind_is_named(tmp_path: Path) -> None:
    for name in ("a.csv", "b.CSV", "c.txt", "README"):
        (tmp_path / name).write_text("no image")
    text = (
        r"no images, sounds or videos but 4 other files \(2 of \.csv, 1 of [^)]+\); expected \.avi"
    )
    with pytest.raises(CalibrationError, match=text):
        read_dataset(tmp_path)


def test_the_hash_follows_images_captions_and_order(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3, 0, captions=True)
    data = read_dataset(folder)
    first = data.sha256()
    assert first == read_dataset(folder).sha256()
    assert first != Dataset(data.name, data.samples[::-1]).sha256()
    assert first != Dataset(data.name, tuple(Sample(s.image) for s in data.samples)).sha256()
    write_images(folder, 3, 1, captions=True)
    assert first != read_dataset(folder).sha256()


def test_a_bad_image_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 3, 0)
    (folder / "001.png").write_bytes(b"not an image")
    with pytest.raises(CalibrationError, match=r"001\.png.*--skip-bad"):
        check_dataset(read_dataset(folder))
    seen: list[tuple[int, int]] = []
    checked = check_dataset(
        read_dataset(folder), skip_bad=True, advance=lambda done, total: seen.append((done, total))
    )
    assert [s.image.name for s in checked.data.samples] == ["000.png", "002.png"]
    assert len(checked.skipped) == 1
    assert "001.png" in checked.skipped[0]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_folder_of_bad_images_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(CalibrationError, match="none of its 1 samples can be read"):
        check_dataset(read_dataset(tmp_path), skip_bad=True)


def test_image_feeds_are_batches_of_the_frozen_preprocessing(tmp_path: Path) -> None:
    data = read_dataset(write_images(tmp_path, 5, 0))
    feeds = [feed["pixel_values"] for feed in feeds_of(data, batch=2)]
    assert [feed.shape for feed in feeds] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    np.testing.assert_array_equal(
        np.concatenate(feeds), PROCESSOR([sample.image for sample in data.samples])["pixel_values"]
    )


def test_feeds_read_images_a_few_batches_ahead(tmp_path: Path) -> None:
    data = read_dataset(write_images(tmp_path, 40, 0))
    feeds = feeds_of(data, batch=2)
    next(feeds)
    data.samples[-1].image.unlink()
    with pytest.raises(CalibrationError, match=r"039\.png"):
        list(feeds)


def feeds_of(data: Dataset, batch: int) -> Iterator[dict[str, Array]]:
    spec = TensorSpec("pixel_values", np.dtype(np.float32), ("batch", 3, 8, 8))
    one = role(None, (spec,), (), lambda *_: {}, feeds={spec.name: ProcessorFeed(processor="x")})
    processors = {"x": PROCESSOR}
    return role_feeds(one, processors, Samples.of(data, processors), batch)


def config(tmp_path: Path, calibration: Path | None, evaluate: Path | None = None) -> ConvertConfig:
    return ConvertConfig(
        "m", tmp_path / "m.mmedge", ("int8",), calibration=calibration, evaluate=evaluate
    )


def checked_data(config: ConvertConfig) -> Data:
    return load_data(config, read_data(config), lambda _: None)


def test_too_few_images_are_noted_with_their_number(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "few", 5, 0)
    (note,) = checked_data(config(tmp_path, folder)).notes
    assert "Only 5 different calibration samples" in note


def test_the_same_image_over_and_over_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "same", 1, 0)
    for index in range(5):
        (folder / f"copy{index}.png").write_bytes((folder / "000.png").read_bytes())
    with pytest.raises(CalibrationError, match="all 6 samples are the same"):
        checked_data(config(tmp_path, folder))


def test_calibration_images_are_not_evaluated_on(tmp_path: Path) -> None:
    calibration = write_images(tmp_path / "a", 34, 0)
    evaluation = write_images(tmp_path / "b", 4, 1)
    assert checked_data(config(tmp_path, calibration, evaluation)).notes == ()
    (evaluation / "copy.png").write_bytes((calibration / "003.png").read_bytes())
    with pytest.raises(CalibrationError, match="1 of its samples are also calibration"):
        checked_data(config(tmp_path, calibration, evaluation))


def test_a_part_of_the_calibration_data_is_held_back(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", 40, 0)
    for index in range(5):  # equal samples stay together
        (folder / f"copy{index}.png").write_bytes((folder / "000.png").read_bytes())
    data = checked_data(config(tmp_path, folder))
    assert data.calibration is not None
    assert data.evaluation is not None
    kept = {sample.image.read_bytes() for sample in data.calibration.samples if sample.image}
    held = {sample.image.read_bytes() for sample in data.evaluation.samples if sample.image}
    assert (len(kept), len(held)) == (32, 8)
    assert not kept & held
    assert data.evaluation.name == "a, held back"
    assert any("were held back to measure quality on" in note for note in data.notes)
    again = checked_data(config(tmp_path, folder))
    assert again.evaluation == data.evaluation


def test_arrays_are_read_by_input(tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    np.savez(path, state=np.zeros((6, 3), np.float32), goal=np.ones((6, 2), np.float32))
    data = read_dataset(path)
    assert (data.name, len(data), sorted(data.arrays)) == ("feeds.npz", 6, ["goal", "state"])
    assert len(data.rows(np.array([0, 5]))) == 2
    specs = tuple(
        TensorSpec(name, np.dtype(np.float32), ("batch", size))
        for name, size in (("state", 3), ("goal", 2))
    )
    one = role(None, specs, (), lambda *_: {})
    feeds = list(role_feeds(one, {}, Samples.of(data, {}), batch=4))
    assert [feed["state"].shape for feed in feeds] == [(4, 3), (2, 3)]
    assert missing_data(one, Samples.of(Dataset("x"), {})) == "an array 'state'"
    fixed = replace(one, inputs=(replace(specs[0], shape=(1, 3)), replace(specs[1], shape=(1, 2))))
    assert len(list(role_feeds(fixed, {}, Samples.of(data, {}), batch=4))) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK no", "not a readable .npz file"),
        (None, "expected one row for each sample"),
    ],
)
def test_arrays_that_cannot_be_used(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    if content is None:
        np.savez(path, a=np.zeros(3), b=np.zeros(4))
    else:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_dataset(path)


def test_a_line_may_leave_caption_and_label_out(tmp_path: Path) -> None:
    write_images(tmp_path, 1, 0)
    entry = {"image": "000.png", "caption": None, "label": None}
    (tmp_path / "captions.jsonl").write_text(json.dumps(entry) + "\n\n")
    assert read_dataset(tmp_path).samples == (Sample(tmp_path / "000.png"),)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damage_of_an_archive_is_found_or_harmless(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    save(path, state=np.arange(12.0).reshape(3, 4), labels=np.arange(3))
    content = path.read_bytes()
    draw = random.Random(0)  # noqa: S311, any damage will do
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(damaged))
            piece = bytes(draw.choices([0, 40, 255, draw.randrange(256)], k=draw.randint(0, 3)))
            damaged[at : at + draw.randint(0, 3)] = piece
        path.write_bytes(damaged)
        with suppress(CalibrationError):  # and nothing else
            read_dataset(path)


def test_videos_are_a_column_and_a_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.webm", "note.txt"):
        (tmp_path / name).write_bytes(name.encode())
    folder = read_dataset(tmp_path)
    assert folder.items(Modality.VIDEO) == (tmp_path / "a.webm", tmp_path / "b.mp4")
    assert folder.items(Modality.IMAGE) == ()
    path = tmp_path / "videos.jsonl"
    path.write_text('{"video": "b.mp4", "caption": "a dog runs", "label": "dog"}\n')
    listed = read_dataset(path)
    assert listed.samples == (Sample(video=tmp_path / "b.mp4", caption="a dog runs", label="dog"),)
    before = listed.sha256()
    (tmp_path / "b.mp4").write_bytes(b"another")
    assert listed.sha256() != before
