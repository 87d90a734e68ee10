from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from converted import write_pictures

from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.checks import load_data
from mmedge.converters.data.datasets import Dataset, Sample, read_dataset
from mmedge.converters.data.feeds import check_dataset, image_feeds, text_feeds
from mmedge.errors import CalibrationError
from mmedge.preprocess import ImageConfig, ImageProcessor
from mmedge.preprocess.steps import Decode, Rescale, Resize

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
    write_pictures(tmp_path / "b", 2, 0)
    write_pictures(tmp_path / "a", 1, 1)
    (tmp_path / "notes.txt").write_text("not a picture")
    names = [s.image.relative_to(tmp_path).as_posix() for s in read_dataset(tmp_path).samples]
    assert names == ["a/000.png", "b/000.png", "b/001.png"]


def test_captions_and_labels_are_read_from_the_folder_or_the_file(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3, 0, captions=True)
    data = read_dataset(folder)
    assert data.samples == read_dataset(folder / "captions.jsonl").samples
    assert data.samples[1] == Sample(
        folder / "001.png", "picture 1 of a green square", "green square"
    )
    assert data.captions[0] == "picture 0 of a red circle"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[]", r"'image' is the path of a picture, got \[\]"),
        ('{"caption": "x"}', "'image' is the path of a picture, got fields caption"),
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
    with pytest.raises(CalibrationError, match="holds no pictures"):
        read_dataset(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(CalibrationError, match=r"a \.jsonl file"):
        read_dataset(tmp_path / "x.csv")


def test_data_of_another_kind_is_named(tmp_path: Path) -> None:
    for name in ("a.wav", "b.WAV", "c.txt", "README"):
        (tmp_path / name).write_text("no picture")
    said = r"holds no pictures but 4 other files \(2 of \.wav, 1 of [^)]+\); expected \.avif"
    with pytest.raises(CalibrationError, match=said):
        read_dataset(tmp_path)


def test_the_hash_follows_pictures_captions_and_order(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3, 0, captions=True)
    data = read_dataset(folder)
    first = data.sha256()
    assert first == read_dataset(folder).sha256()
    assert first != Dataset(data.name, data.samples[::-1]).sha256()
    assert first != Dataset(data.name, tuple(Sample(s.image) for s in data.samples)).sha256()
    write_pictures(folder, 3, 1, captions=True)
    assert first != read_dataset(folder).sha256()


def test_a_bad_picture_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set", 3, 0)
    (folder / "001.png").write_bytes(b"not a picture")
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


def test_a_folder_of_bad_pictures_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(CalibrationError, match="none of its 1 pictures can be read"):
        check_dataset(read_dataset(tmp_path), skip_bad=True)


def test_image_feeds_are_batches_of_the_frozen_preprocessing(tmp_path: Path) -> None:
    data = read_dataset(write_pictures(tmp_path, 5, 0))
    feeds = [feed["pixel_values"] for feed in image_feeds(data.samples, PROCESSOR, batch=2)]
    assert [feed.shape for feed in feeds] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    np.testing.assert_array_equal(
        np.concatenate(feeds), PROCESSOR([sample.image for sample in data.samples])["pixel_values"]
    )


def test_feeds_read_pictures_only_as_they_are_taken(tmp_path: Path) -> None:
    data = read_dataset(write_pictures(tmp_path, 4, 0))
    feeds = image_feeds(data.samples, PROCESSOR, batch=2)
    next(feeds)
    data.samples[3].image.unlink()
    with pytest.raises(CalibrationError, match=r"003\.png"):
        next(feeds)


def config(tmp_path: Path, calibration: Path | None, evaluate: Path | None = None) -> ConvertConfig:
    return ConvertConfig(
        "m", tmp_path / "m.mmedge", ("int8",), calibration=calibration, evaluate=evaluate
    )


def test_too_few_pictures_are_noted_with_their_number(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "few", 5, 0)
    (note,) = load_data(config(tmp_path, folder), lambda _: None).notes
    assert "Only 5 different calibration pictures" in note


def test_the_same_picture_over_and_over_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "same", 1, 0)
    for index in range(5):
        (folder / f"copy{index}.png").write_bytes((folder / "000.png").read_bytes())
    with pytest.raises(CalibrationError, match="all 6 pictures are the same"):
        load_data(config(tmp_path, folder), lambda _: None)


def test_calibration_pictures_are_not_evaluated_on(tmp_path: Path) -> None:
    calibration = write_pictures(tmp_path / "a", 34, 0)
    evaluation = write_pictures(tmp_path / "b", 4, 1)
    assert load_data(config(tmp_path, calibration, evaluation), lambda _: None).notes == ()
    (evaluation / "copy.png").write_bytes((calibration / "003.png").read_bytes())
    with pytest.raises(CalibrationError, match="1 of its pictures are also calibration"):
        load_data(config(tmp_path, calibration, evaluation), lambda _: None)


def test_text_feeds_name_a_text_that_cannot_be_encoded(tiny_bundle: object) -> None:
    from mmedge.bundle import Bundle
    from mmedge.preprocess import TextProcessor

    assert isinstance(tiny_bundle, Bundle)
    text = tiny_bundle.manifest.preprocessing.text
    assert text is not None
    processor = TextProcessor(text, tiny_bundle.path / text.tokenizer_file)
    feeds = list(text_feeds(["a", "b", "a b"], processor, batch=2))
    assert [len(feed[text.input]) for feed in feeds] == [2, 1]
    with pytest.raises(CalibrationError, match="empty"):
        list(text_feeds([" "], processor))


def test_a_line_may_leave_caption_and_label_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1, 0)
    entry = {"image": "000.png", "caption": None, "label": None}
    (tmp_path / "captions.jsonl").write_text(json.dumps(entry) + "\n\n")
    assert read_dataset(tmp_path).samples == (Sample(tmp_path / "000.png"),)
