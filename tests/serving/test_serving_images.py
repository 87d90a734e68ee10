"""Images that the page shows: which files are opened, and what becomes of them."""

from __future__ import annotations

import io
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from served import MemoryStore, client_of, unit, write_photos

from mmedge.errors import ImageError
from mmedge.retrieval.items import Item
from mmedge.serving import images
from mmedge.serving.images import SourceFolders, Thumbnails


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Photos in a folder and below, one outside, and every kind of link and file between them."""
    shown, outside = tmp_path / "shown", tmp_path / "outside"
    write_photos(shown)
    write_photos(shown / "below")
    write_photos(outside)
    write_photos(tmp_path / "shown-not")  # its name begins with that of the folder
    (shown / "inner.png").symlink_to(shown / "below" / "red.png")
    (shown / "escape.png").symlink_to(outside / "red.png")
    (shown / "relative.png").symlink_to("../outside/red.png")
    (shown / "folder").symlink_to(outside)
    (shown / "loop.png").symlink_to(shown / "loop.png")
    (shown / "text.txt").write_text("secret")
    (shown / "folder.png").mkdir()
    os.mkfifo(shown / "pipe.png")
    return tmp_path


@pytest.mark.parametrize("name", ["red.png", "below/blue.png", "inner.png", "below/../red.png"])
def test_files_in_the_folder_are_opened(tree: Path, name: str) -> None:
    with SourceFolders([tree / "shown"]).open(str(tree / "shown" / name)) as file:
        assert file.read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    "name",
    [
        "shown/escape.png",
        "shown/relative.png",
        "shown/folder/red.png",
        "shown/../outside/red.png",
        "outside/red.png",
        "shown-not/red.png",
        "shown/loop.png",
        "shown/absent.png",
        "shown/text.txt",
        "shown/folder.png",
        "shown/pipe.png",
        "shown",
        "",
        "shown/red.png\0.png",
        "shown/red.png/x.png",
        "shown/" + "x" * 5000 + ".png",
    ],
)
def test_nothing_else_is_opened(tree: Path, name: str) -> None:
    with pytest.raises(ImageError, match="no image to show") as caught:
        SourceFolders([tree / "shown"]).open(f"{tree}/{name}")
    assert str(tree) not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["red.png", "/etc/passwd", "/proc/self/environ", "http://x/a.png"]
)
def test_sources_that_are_no_absolute_path_of_an_image_are_refused(tree: Path, source: str) -> None:
    with pytest.raises(ImageError, match="no image to show"):
        SourceFolders([tree / "shown", Path("/")]).open(source)


def test_a_folder_given_by_a_link_is_resolved_once(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "shown")
    folders = SourceFolders([tree / "link"])
    folders.open(str(tree / "link" / "red.png")).close()
    (tree / "link").unlink()
    (tree / "link").symlink_to(tree / "outside")
    with pytest.raises(ImageError, match="no image to show"):
        folders.open(str(tree / "link" / "red.png"))


@pytest.mark.parametrize("swapped", ["below/red.png", "below"])
def test_a_link_put_there_after_the_check_is_not_followed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    place = tree / "shown" / swapped
    real = os.path.realpath
    folders = SourceFolders([tree / "shown"])

    def resolve_then_swap(path: str, *, strict: bool = False) -> str:
        resolved = real(path, strict=strict)
        place.rename(tree / "moved")
        place.symlink_to(tree / "outside" / ("red.png" if place.suffix else ""))
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    with pytest.raises(ImageError, match="no image to show"):
        folders.open(str(tree / "shown" / "below" / "red.png"))


def test_without_folders_nothing_is_opened(tree: Path) -> None:
    with pytest.raises(ImageError, match="no image to show"):
        SourceFolders([]).open(str(tree / "shown" / "red.png"))


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_file_stays_open(tree: Path) -> None:
    folders = SourceFolders([tree / "shown"])
    before = open_files()
    for name in ("red.png", "below/red.png", "pipe.png", "folder.png", "escape.png", "absent.png"):
        with suppress(ImageError):
            folders.open(str(tree / "shown" / name)).close()
    assert open_files() == before


def test_a_thumbnail_is_kept_until_its_file_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = images._thumbnail
    monkeypatch.setattr(
        images, "_thumbnail", lambda file, side: made.append(side) or real(file, side)
    )
    thumbnails = Thumbnails(SourceFolders([tree / "shown"]))
    source = str(tree / "shown" / "red.png")
    first = thumbnails.get(source, 32)
    assert thumbnails.get(source, 32) == first
    assert made == [32]
    thumbnails.get(source, 16)
    Image.new("RGB", (64, 48), "black").save(source)
    os.utime(source, (1, 1))
    assert thumbnails.get(source, 32) != first
    assert made == [32, 16, 32]


def test_the_memory_of_thumbnails_is_bounded(tree: Path) -> None:
    folders = SourceFolders([tree / "shown"])
    size = len(Thumbnails(folders).get(str(tree / "shown" / "red.png"), 32))
    thumbnails = Thumbnails(folders, limit_bytes=2 * size + 20)
    for colour in ("red", "green", "blue", "red"):
        thumbnails.get(str(tree / "shown" / f"{colour}.png"), 32)
    assert thumbnails._size_bytes == sum(map(len, thumbnails._kept.values()))
    assert thumbnails._size_bytes <= 2 * size + 20
    assert [Path(key[0]).stem for key in thumbnails._kept][-1] == "red"


def test_metadata_of_the_source_is_not_passed_on(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif, comment=b"secret comment")
    data = Thumbnails(SourceFolders([tmp_path])).get(str(tmp_path / "a.jpg"), 32)
    assert b"at home" not in data
    assert b"secret" not in data
    assert not Image.open(io.BytesIO(data)).getexif()


def hostile_images() -> dict[str, bytes]:
    """Files that are no images, damaged ones, and one that would fill the memory."""
    buffer = io.BytesIO()
    Image.new("L", (20, 20)).save(buffer, "PNG")
    png = buffer.getvalue()
    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    return {
        "text": b"not an image",
        "html": b"<!DOCTYPE html><script>alert(1)</script>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "cut": png[:40],
        "huge": huge,
        "zeros": bytes(10_000),
        "random": random.Random(0).randbytes(10_000),  # noqa: S311
        "gif": b"GIF89a" + bytes(20),
    }


@pytest.mark.parametrize("kind", hostile_images())
def test_files_that_are_no_images_are_refused(
    kind: str, tmp_path: Path, model: object, store: MemoryStore
) -> None:
    data = hostile_images()[kind]
    (tmp_path / "a.png").write_bytes(data)
    store.upsert([Item("hostile", unit(1, 0, 0, 0), source=str(tmp_path / "a.png"))])
    client = client_of(store, model, [tmp_path])  # type: ignore[arg-type]
    shown = client.get("/api/thumbnails/hostile")
    assert shown.status_code == 404
    asked = client.post("/api/search/image", content=data)
    assert asked.status_code == 400, asked.text
    for response in (shown, asked):
        assert response.headers["content-type"] == "application/problem+json"
        assert str(tmp_path) not in response.text


def test_an_empty_upload_is_refused(model: object, store: MemoryStore) -> None:
    client = client_of(store, model, [])  # type: ignore[arg-type]
    assert client.post("/api/search/image", content=b"").status_code == 400


def test_an_upload_beyond_the_limit_is_refused(model: object, store: MemoryStore) -> None:
    client = client_of(store, model, [])  # type: ignore[arg-type]
    for content in (bytes((20 << 20) + 1), iter([bytes(1 << 20)] * 21)):
        found = client.post("/api/search/image", content=content)
        assert found.status_code == 413
        assert "20971520 bytes" in found.json()["detail"]
    assert client.post("/api/search", content=bytes((1 << 20) + 1)).status_code == 413
