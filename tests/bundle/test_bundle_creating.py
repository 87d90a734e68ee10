"""Creating a bundle: there whole or not at all, and never in the place of something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bundles import edit_manifest, tiny_manifest, write_tiny_bundle

from mmedge.bundle import (
    Bundle,
    create_bundle,
    describe_files,
    open_bundle,
    verify_files,
    write_manifest,
)
from mmedge.errors import BundleError, IntegrityError, ManifestError, StorageError


def copy_into(folder: Path, bundle: Bundle) -> None:
    for relative in ("manifest.json", *bundle.manifest.files):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(bundle.file(relative).read_bytes())


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_tiny_bundle(tmp_path / "first.mmedge")
    second = write_tiny_bundle(tmp_path / "second.mmedge")
    for relative in ("manifest.json", *first.manifest.files):
        assert first.file(relative).read_bytes() == second.file(relative).read_bytes()


@pytest.mark.parametrize("name", ["clip", "clip.onnx", "clip.MMEDGE", "clip.mmedge.zip", ".mmedge"])
def test_the_suffix_is_required(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(BundleError, match=r"must end in '\.mmedge'"),
        create_bundle(tmp_path / name),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_kept_without_overwrite(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="--overwrite"), create_bundle(tiny_bundle.path):
        pytest.fail("the block must not run")
    verify_files(open_bundle(tiny_bundle.path))


def test_an_existing_bundle_is_replaced_with_overwrite(tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = write_tiny_bundle(tmp_path / "other.mmedge")
    edit_manifest(other.path, "name", value="other")
    with create_bundle(tiny_bundle.path, overwrite=True) as folder:
        copy_into(folder, other)
        assert open_bundle(tiny_bundle.path).manifest.name == "tiny"
    assert open_bundle(tiny_bundle.path).manifest.name == "other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.mmedge", "tiny.mmedge"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "dangling link"])
def test_a_folder_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, kind: str, overwrite: bool
) -> None:
    place = tmp_path / "photos.mmedge"
    bundle = write_tiny_bundle(tmp_path / "real.mmedge")
    if kind == "file":
        place.write_bytes(b"mine")
    elif kind.endswith("folder"):
        place.mkdir()
        if kind == "folder":
            (place / "photo.jpg").write_bytes(b"mine")
    else:
        place.symlink_to(bundle.path if kind == "link" else tmp_path / "gone")
    before = place.lstat()
    with (
        pytest.raises(BundleError, match="exists and is not a bundle"),
        create_bundle(place, overwrite=overwrite),
    ):
        pytest.fail("the block must not run")
    assert place.lstat() == before
    assert kind != "folder" or (place / "photo.jpg").read_bytes() == b"mine"


def test_a_bundle_that_appears_meanwhile_is_kept(tmp_path: Path, tiny_bundle: Bundle) -> None:
    place = tmp_path / "new.mmedge"
    with (  # noqa: PT012
        pytest.raises(StorageError, match="exists already"),
        create_bundle(place) as folder,
    ):
        copy_into(folder, tiny_bundle)
        write_tiny_bundle(place)
        (place / "mark").touch()
    assert (place / "mark").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with (  # noqa: PT012
        pytest.raises(error),
        create_bundle(tmp_path / "clip.mmedge") as folder,
    ):
        (folder / "model.onnx").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_would_not_open_is_not_published(tmp_path: Path, tiny_bundle: Bundle) -> None:
    for damage, error in (("tokenizer.json", IntegrityError), ("manifest.json", ManifestError)):
        with (  # noqa: PT012
            pytest.raises(error),
            create_bundle(tiny_bundle.path, overwrite=True) as folder,
        ):
            copy_into(folder, tiny_bundle)
            (folder / damage).unlink()
        verify_files(open_bundle(tiny_bundle.path))
        assert list(tmp_path.iterdir()) == [tiny_bundle.path]


def test_a_kill_leaves_the_older_bundle_whole(tiny_bundle: Bundle, tmp_path: Path) -> None:
    script = (
        "import os, sys; from mmedge.bundle import create_bundle\n"
        "with create_bundle(sys.argv[1], overwrite=True) as folder:\n"
        "    (folder / 'model.onnx').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(tiny_bundle.path)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    verify_files(open_bundle(tiny_bundle.path))
    assert len(list(tmp_path.iterdir())) == 2
    with create_bundle(tiny_bundle.path, overwrite=True) as folder:
        copy_into(folder, tiny_bundle)
    verify_files(open_bundle(tiny_bundle.path))
    assert list(tmp_path.iterdir()) == [tiny_bundle.path]


def test_files_are_described_in_order_and_by_posix_path(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "b.bin").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    entries = describe_files(tmp_path)
    assert list(entries) == ["a", "b.bin", "b/x"]
    assert entries["b/x"].size_bytes == 3
    # FIPS 180-2, appendix B.1.
    assert entries["b/x"].sha256 == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_a_link_is_not_described(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="is a link or a special file"):
        describe_files(tmp_path)


def test_a_manifest_is_written_for_people(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = tiny_manifest(dict(tiny_bundle.manifest.files))
    write_manifest(tmp_path, manifest.model_copy(update={"name": "Größe"}))
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "format_version": "2.0",\n  "name": "Größe",\n')
    assert text.endswith("\n}\n")
