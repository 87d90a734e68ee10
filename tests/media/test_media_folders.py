"""Folders of images and sounds: what is found, when it was taken, what is left out."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest
from PIL import Image

from mmedge.errors import InputError
from mmedge.media.folders import Folder, folder_files, taken_at
from mmedge.specs import Modality


def write_photo(path: Path, **exif: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.Exif()
    tags = {"taken": 0x9003, "fraction": 0x9291, "offset": 0x9011}
    made[0x8769] = {tags[name]: value for name, value in exif.items()}
    Image.new("RGB", (8, 8)).save(path, exif=made)
    return path


def test_a_folder_yields_images_and_sounds_by_path(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.png", "a/c.WAV", "notes.txt", ".hidden.jpg", ".cache/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    found = list(folder_files(tmp_path))
    assert [(file.name, file.modality) for file in found] == [
        ("b.jpg", Modality.IMAGE),
        ("a/c.WAV", Modality.AUDIO),
        ("a/z.png", Modality.IMAGE),
    ]
    assert found[0].size_bytes == 5
    assert found[0].modified_ns == (tmp_path / "b.jpg").stat().st_mtime_ns


def test_links_stay_inside_and_hostile_names_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    secret = write_photo(tmp_path / "secret" / "x.jpg")
    write_photo(folder / "sub" / "a.jpg")
    (folder / "inside.jpg").symlink_to(folder / "sub" / "a.jpg")
    (folder / "outside.jpg").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (folder / "new\nline.jpg").write_bytes(b"x")
    skipped: dict[str, str] = {}
    found = [file.name for file in folder_files(folder, skipped=skipped.__setitem__)]
    assert found == ["inside.jpg", "new\nline.jpg", "sub/a.jpg"]
    reasons = {Path(path).name: reason for path, reason in skipped.items()}
    assert "out of the folder" in reasons["outside.jpg"]
    assert reasons["pipe.jpg"] == "not a regular file"
    assert "not UTF-8" in reasons[os.fsdecode(b"caf\xe9.jpg")]
    assert "loop.jpg" in reasons


@pytest.mark.parametrize("what", ["missing", "a file", "a\0b"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(InputError, match=r"Check the path|expected a folder"):
        list(folder_files(tmp_path / what))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [("+02:00", "2024-05-06T05:08:09.250+00:00"), ("Z", "2024-05-06T07:08:09.250+00:00")],
)
def test_the_time_of_a_photo_is_from_exif(tmp_path: Path, offset: str, expected: str) -> None:
    photo = write_photo(
        tmp_path / "a.jpg", taken="2024:05:06 07:08:09", fraction="25", offset=offset
    )
    assert taken_at(photo) == datetime.fromisoformat(expected).timestamp()
    (frame,) = Folder(tmp_path)
    assert frame.time == taken_at(photo)
    assert (frame.item, frame.source) == (photo, str(photo))


def test_a_time_without_zone_is_local(tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "a.jpg", taken="2024:05:06 07:08:09")
    assert taken_at(photo) == datetime(2024, 5, 6, 7, 8, 9).astimezone(timezone.utc).timestamp()


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "soon", ""])
def test_without_a_usable_time_the_file_s_own_counts(tmp_path: Path, taken: str) -> None:
    photo = write_photo(tmp_path / "a.jpg", taken=taken)
    os.utime(photo, (1000, 1234.5))
    assert taken_at(photo) is None
    (frame,) = Folder(tmp_path)
    assert frame.time == 1234.5


def test_damaged_files_have_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif")
    assert taken_at(tmp_path / "a.jpg") is None
    assert taken_at(tmp_path / "gone.jpg") is None
