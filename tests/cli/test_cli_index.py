"""`mmedge index` and `mmedge search` on a folder, through files of vectors and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from converted import write_images
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.retrieval.index import Index


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos" / "kitchen", 6, 1)
    return write_images(tmp_path / "photos", 3, 2)


@pytest.fixture
def made(photos: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> Path:
    run(capsys, "index", "add", "photos", "-m", "tiny.mmedge", "-o", "p.index")
    return Path("p.index")


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    document = json.loads(run(capsys, "index", "add", *arguments, "--json"))
    (source,) = document["sources"]
    return {key: source[key] for key in ("added", "updated", "unchanged", "removed", "failed")}


def counts(**given: int) -> dict[str, int]:
    return dict.fromkeys(("added", "updated", "unchanged", "removed", "failed"), 0) | given


def test_a_folder_is_kept_up_to_date(
    made: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("photos", "-o", "p.index")
    assert report(capsys, *again) == counts(unchanged=9)
    os.utime(photos / "000.png", (1, 1))
    Image.new("RGB", (9, 9), "red").save(photos / "001.png")
    (photos / "002.png").unlink()
    (photos / "bad.jpg").write_bytes(b"no image")
    assert report(capsys, *again) == counts(unchanged=7, updated=1, failed=1)
    assert report(capsys, *again, "--prune") == counts(unchanged=8, removed=1, failed=1)
    with Index.open(made) as index:
        (touched, gone) = index.get(["photos/000.png", "photos/002.png"])
        assert touched is not None
        assert touched.metadata["modified_ns"] == 1_000_000_000
        assert gone is None


def test_embeddings_are_those_of_the_model(made: Path, photos: Path) -> None:
    with Index.open(made) as index:
        (item,) = index.get(["photos/kitchen/003.png"])
        assert item is not None
        expected = index.model.encode_image(photos / "kitchen" / "003.png")
        np.testing.assert_allclose(item.vectors, expected, atol=1e-3)
        assert item.metadata["tag"] == ["kitchen"]


def test_search_finds_an_image_and_draws_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = "photos/kitchen/003.png"
    found = json.loads(
        run(capsys, "search", "p.index", "--image", image, "-k", "4", "--json", "--sheet", "h.png")
    )
    assert found["matches"][0]["id"] == image
    assert len(found["matches"]) == 4
    with Image.open("h.png") as sheet, Image.open(image) as shown:
        shown.thumbnail((224, 224))
        centre = sheet.getpixel((16 + 112, 48 + 112))
        assert centre == shown.convert("RGB").getpixel((shown.width // 2, shown.height // 2))
    text = run(capsys, "search", "p.index", "a mug", "--where", 'tag = "kitchen"', "-k", "9")
    assert text.count("photos/kitchen/") == 6


@pytest.mark.parametrize("name", ["out.npz", "out.parquet"])
def test_an_export_survives_an_import(
    made: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "9 items, 9 vectors" in run(capsys, "index", "export", "p.index", name)
    run(capsys, "index", "import", "q.index", name)
    assert "space tiny-0001" in " ".join(run(capsys, "index", "stats", "q.index").split())
    with Index.open("p.index") as first, Index.open("q.index") as second:
        for one, other in zip(first.items(), second.items(), strict=True):
            assert (one.id, one.time, one.source, one.content_hash, one.revision, one.origin) == (
                other.id, other.time, other.source, other.content_hash, other.revision, other.origin
            )  # fmt: skip
            assert dict(one.metadata) == dict(other.metadata)
            np.testing.assert_allclose(one.vectors, other.vectors, atol=2e-3)


def test_a_bundle_that_moved_is_named(
    made: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle.path.rename("moved.mmedge")
    assert "tiny.mmedge is not there" in run(capsys, "search", "p.index", "a mug", code=1)
    assert "photos/" in run(capsys, "search", "p.index", "a mug", "-m", "moved.mmedge")


def test_two_folders_of_one_name_are_not_mixed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_images(tmp_path / "trip" / "photos", 1, 5)
    err = run(capsys, "index", "add", str(other), "-o", "p.index", code=1)
    assert "--prefix" in err
    run(capsys, "index", "add", str(other), "-o", "p.index", "--prefix", "trip")
    with Index.open(made) as index:
        assert "trip/000.png" in index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "add", "gone", "-o", "p.index"), "no such file or folder"),
        (("index", "add", "notes.txt", "-o", "p.index"), "expected a folder of images"),
        (("index", "add", "empty", "-o", "x.index", "-m", "tiny.mmedge"), "holds no image"),
        (("index", "add", "photos", "-o", "x.index"), "-m"),
        (("index", "stats", "photos"), "photos"),
        (("index", "export", "p.index", "x.csv"), "expected .npz or .parquet"),
        (("search", "gone.index", "a"), "gone.index"),
        (("search", "p.index", "a", "--where", "tag ="), "tag ="),
        (("search", "p.index", "--image", "gone.png"), "no such file"),
    ],
)
def test_mistakes_are_one_message(
    made: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    err = run(capsys, *arguments, code=1)
    assert err.lstrip().startswith("Error: ")  # an old rich ends its bar with an empty line
    assert message in err


def test_a_search_for_nothing_is_wrong_usage(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Nothing to look for" in run(capsys, "search", "p.index", code=2)


def test_an_index_is_checked_repaired_and_compacted(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "index", "verify", "p.index") == "p.index: whole\n"
    assert "9 of 4 dimensions" in run(capsys, "index", "stats", "p.index")
    Path("searches.txt").write_text("a red mug\n\na blue cup\n", "utf-8")
    assert "now" in run(capsys, "index", "compact", "p.index", "--queries", "searches.txt")
    assert "now" in run(capsys, "index", "compact", "p.index")
    snapshot = next((made / "snapshots").glob("*.f16"))
    snapshot.write_bytes(snapshot.read_bytes()[:-8] + b"\xff" * 8)
    done = json.loads(run(capsys, "index", "verify", "p.index", "--repair", "--json"))
    assert done["problems"]
    assert not done["lost"]
    assert run(capsys, "index", "verify", "p.index") == "p.index: whole\n"


def test_an_index_takes_another_bundle(
    made: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle.path.rename("moved.mmedge")
    run(capsys, "index", "migrate", "p.index", "-m", "moved.mmedge")
    assert "photos/" in run(capsys, "search", "p.index", "a mug", "--unlike", "a cat")
