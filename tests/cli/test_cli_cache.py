"""`mmedge cache`: what is listed, and what is removed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mmedge.cli import main
from mmedge.runtimes.engines.spec import (
    BuiltEngine,
    EngineKey,
    EngineRequest,
    ShapeProfile,
    ShapeRange,
)
from mmedge.runtimes.engines.store import EngineCache

PROFILE = ShapeProfile({"pixels": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8))})
KEY = EngineKey("a" * 64, EngineRequest("tensorrt", (), (PROFILE,)), "10.3", "12.6", "", "8.7")
BUILT = BuiltEngine(b"plan" * 1000, (), (), (), 2.0)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["cache", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """Engines of two versions of TensorRT, of which the newer is installed, and other things."""
    monkeypatch.setattr(
        "mmedge.runtimes.trt.backend.installed_version",
        {"tensorrt": "10.7"}.get,
    )
    cache = EngineCache()
    cache.store(KEY, BUILT, label="clip.mmedge/image_encoder/fp16.onnx")
    cache.store(replace(KEY, version="10.7"), BUILT, label="clip.mmedge/image_encoder/fp16.onnx")
    cache.store(
        replace(KEY, request=replace(KEY.request, backend="tensorrt-rtx"), version="1.7"),
        BUILT,
        label="clip.mmedge/text\x1b[2J_encoder/fp16.onnx",
    )
    cache.timing_cache("tensorrt", "10.7", "8.7").write_bytes(b"timings")
    (folder / "backends").mkdir()
    (folder / "backends" / "0123.json").write_bytes(b"{}")
    return cache


def test_an_empty_cache_is_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    assert out.startswith(f"In {folder}:\n0 engines, 0 B; timing caches: 0, 0 B; ")
    assert run(capsys, "prune")[1] == "0 engines removed, 0 B; 0 engines kept, 0 B.\n"
    assert not folder.exists()


def test_engines_are_listed(filled: EngineCache, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "mmedge/" in line]
    assert [row[1:6] for row in rows[1:]] == [
        ["tensorrt", "10.7", "8.7", "1..4x3x8x8", rows[1][5]],
        ["tensorrt", "10.3", "8.7", "1..4x3x8x8", rows[2][5]],
    ]
    assert [row[-1] for row in rows] == ["ok"] * 3
    assert "\x1b" not in out
    assert "3 engines, 1" in out
    assert "; timing caches: 1, 7 B; runtime caches: 0, 0 B; " in out
    assert out.endswith("backend choices: 1, 2 B\n")


def test_json_has_all_that_an_engine_depends_on(
    filled: EngineCache, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["folder"] == str(folder)
    assert document["timing_caches"] == {"files": 1, "size_bytes": 7}
    assert document["backend_choices"] == {"files": 1, "size_bytes": 2}
    engine = document["engines"][-1]
    assert engine["label"] == "clip.mmedge/image_encoder/fp16.onnx"
    assert (engine["fault"], engine["being_built"]) == (None, False)
    assert engine["key"]["version"] == "10.3"
    assert engine["key"]["request"]["profiles"][0]["ranges"]["pixels"]["max"] == [4, 3, 8, 8]
    assert engine["size_bytes"] > len(BUILT.plan)


def test_a_damaged_engine_is_reported(
    filled: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    found = filled.load(KEY)
    assert found.path is not None
    found.path.write_bytes(b"PLAN" * 1000)
    assert "its plan was changed" not in run(capsys, "list")[1]
    assert run(capsys, "list", "--verify")[1].count("its plan was changed") == 1
    next(filled.folder.glob("*.json")).write_bytes(b"{")
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "its record is damaged" in out


def test_prune_removes_engines_of_other_versions(
    filled: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "prune", "--dry-run")
    message = "built for tensorrt 10.3, this is 10.7"
    assert code == 0
    assert out.splitlines()[0].startswith("clip.mmedge/image_encoder/fp16.onnx: would be removed,")
    assert message in out
    assert "1 engine would be removed" in out
    assert len(filled.entries()) == 3
    code, out, _ = run(capsys, "prune")
    assert code == 0
    assert message in out
    assert "1 engine removed" in out
    assert "2 engines kept" in out
    # That of a flavour that is not installed may have been built for elsewhere.
    assert {entry.record.key.version for entry in filled.entries() if entry.record} == {
        "10.7",
        "1.7",
    }


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--older-than", "1"], 2),
        (["--older-than", "0"], 0),
        (["--keep-mib", "1"], 2),
        (["--keep-mib", "0.006"], 1),
        (["--model", "image_encoder"], 1),
        (["--all"], 0),
    ],
)
def test_options_remove_more(
    filled: EngineCache,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    left: int,
) -> None:
    code, out, err = run(capsys, "prune", *arguments)
    assert (code, err) == (0, "")
    assert f"{left} engine{'' if left == 1 else 's'} kept" in out
    assert len(filled.entries()) == left
    everything = arguments == ["--all"]
    assert (folder / "backends" / "0123.json").exists() != everything
    assert ("and 1 choice of a backend removed" in out) == everything
    assert filled.timing_cache("tensorrt", "10.7", "8.7").exists() != everything
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["empty"],
        ["prune", "--all", "--keep-mib", "1"],
        ["prune", "--older-than", "-1"],
        ["prune", "--keep-mib", "many"],
        ["list", "extra"],
    ],
)
def test_wrong_usage_exits_with_2(
    filled: EngineCache, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "Usage: mmedge cache" in out + err
    assert len(filled.entries()) == 3


def test_a_cache_that_others_can_write_is_refused(
    filled: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.folder.chmod(0o777)
    for arguments in (["list"], ["prune"], ["prune", "--all"]):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert "can be written by others (mode 0777)" in err


@pytest.mark.parametrize("pointed_at", ["the output", "its folder"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_prune_removes_leftovers_beside_outputs(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pointed_at: str,
    dry_run: bool,
) -> None:
    made = tmp_path / "made"
    left = [
        made / ".clip.mmedge.0123abcd.partial",
        made / ".clip.mmedge.search",
        folder / ".choices.json.89abcdef.partial",
        folder / "backends" / ".1.json.89abcdef.partial",
    ]
    others = [
        made / "clip.mmedge",
        made / ".hidden",
        made / ".clip.mmedge.partial",
        made / "mine.search",
    ]
    for path in (*left, *others):
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes(b"half")
    (made / "clip.mmedge" / "manifest.json").write_bytes(b"{}")
    running = made / ".clip.mmedge.deadbeef.partial"
    running.mkdir()
    aside = made / ".other.mmedge.0123abcd.old"  # moved by a writer that was killed between renames
    aside.mkdir()

    output = made / "clip.mmedge" if pointed_at == "the output" else made
    with locked(running):
        code, out, err = run(capsys, "prune", str(output), *(["--dry-run"] if dry_run else []))
    assert (code, err) == (0, "")
    assert all(path.exists() for path in (*others, running))
    for path in left:
        assert path.exists() is dry_run
        assert f"{path}: {'would be ' if dry_run else ''}removed, 4 B: leftover of a run" in out
    restored = not dry_run and pointed_at == "its folder"
    assert (made / "other.mmedge").exists() is restored
    assert aside.exists() is not restored


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As a running writer holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)
