"""The engine cache: hits, misses, damage and permissions."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cached import OTHER_PLAN, PLAN, built, key, profile
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import BackendError, EngineMismatchError, InputError, StorageError
from mmedge.files import atomic
from mmedge.files import locks as key_lock
from mmedge.files.cache_folder import cache_folder
from mmedge.runtimes.engines import files as engine_files
from mmedge.runtimes.engines.record import RecordError, key_digest, parse_record, record_of
from mmedge.runtimes.engines.spec import (
    BuildSettings,
    BuiltEngine,
    EngineKey,
    EngineRequest,
)
from mmedge.runtimes.engines.store import CachedEngine, EngineCache, Miss, PruneRule


def never() -> BuiltEngine:
    pytest.fail("there is nothing to build")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache" / "engines")


@pytest.fixture
def stored(cache: EngineCache) -> CachedEngine:
    """The engine of key() in the cache."""
    return cache.store(key(), built(), label="clip.mmedge/image_encoder/fp16.onnx")


def record_path(cache: EngineCache) -> Path:
    return cache.folder / f"{key_digest(key())}.json"


def test_an_engine_that_was_stored_is_found_and_loaded(
    cache: EngineCache, stored: CachedEngine
) -> None:
    assert cache.find(key()) == stored
    loaded = cache.load(key())
    assert (loaded.plan, loaded.path, loaded.miss) == (PLAN, stored.path, None)
    assert loaded.record == stored.record
    made = built()
    assert loaded.record.key == key()
    assert loaded.record.layers == made.layers
    assert loaded.record.warnings == made.warnings
    assert loaded.record.label == "clip.mmedge/image_encoder/fp16.onnx"


def test_an_engine_is_built_once_and_then_found(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mmedge.engines"):
        first = cache.get_or_build(key(), built, label="fp16.onnx")
    assert isinstance(first.miss, Miss)
    assert caplog.messages == ["fp16.onnx: no engine of this model has been built yet: building"]
    second = cache.get_or_build(key(), never)
    assert second.miss is None
    assert (first.plan, first.path) == (second.plan, second.path)
    assert {path.suffix for path in cache.folder.iterdir()} == {".json", ".plan"}


def test_the_folder_is_private_whatever_the_umask(cache: EngineCache) -> None:
    before = os.umask(0)
    try:
        cache.get_or_build(key(), built)
        cache.timing_cache("tensorrt", "10.3", "8.7")
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    modes = {path.stat().st_mode & 0o777 for path in cache.folder.iterdir() if path.is_file()}
    assert modes == {0o600}
    cache.load(key())


def test_the_default_folder() -> None:
    assert EngineCache().folder == cache_folder() / "engines"


def test_a_failed_build_leaves_nothing(cache: EngineCache) -> None:
    def fail() -> BuiltEngine:
        raise BackendError("no memory")

    with pytest.raises(BackendError, match="no memory"):
        cache.get_or_build(key(), fail)
    assert list(cache.folder.iterdir()) == []
    assert cache.get_or_build(key(), built).plan == PLAN


def test_an_empty_plan_is_no_engine(cache: EngineCache) -> None:
    with pytest.raises(InputError, match="empty"):
        cache.get_or_build(key(), lambda: replace(built(), plan=b""))
    assert isinstance(cache.find(key()), Miss)


def test_storing_again_replaces_the_engine(cache: EngineCache, stored: CachedEngine) -> None:
    again = cache.store(key(), built(OTHER_PLAN))
    assert cache.load(key()).plan == OTHER_PLAN
    assert not stored.path.exists()
    assert sorted(cache.folder.iterdir()) == sorted([again.path, record_path(cache)])


# Keys that differ from key(), and the explanation.
MISSES: dict[str, tuple[EngineKey, str]] = {
    "version": (
        key(version="10.7.0.23"),
        "built for tensorrt 10.3.0.26, this is 10.7.0.23",
    ),
    "cuda": (replace(key(), cuda="13.0"), "built for CUDA 12.6, this is 13.0"),
    "driver": (replace(key(), driver="580.95"), "built for driver 540.4, this is 580.95"),
    "no driver": (replace(key(), driver=""), "built for driver 540.4, this is none"),
    "gpu": (key(capability="11.0"), "built for compute capability 8.7, expected 11.0"),
    "backend": (
        replace(key(), request=replace(key().request, backend="tensorrt-rtx"), version="1.7"),
        "built for tensorrt 10.3.0.26, this is tensorrt-rtx 1.7",
    ),
    "shapes": (
        replace(key(), request=replace(key().request, profiles=(profile(32),))),
        r"built for 'x' from \(1, 3\) over .* to \(8, 3\), requested .* to \(32, 3\)",
    ),
    "profiles": (
        replace(key(), request=replace(key().request, profiles=(profile(1), profile(8)))),
        "built with 1 shape profiles, requested 2",
    ),
    "settings": (
        replace(
            key(), request=replace(key().request, settings=BuildSettings(workspace_bytes=1 << 20))
        ),
        "built with workspace_bytes 1073741824, requested 1048576",
    ),
    "two": (
        replace(key(version="10.7.0.23"), cuda="13.0"),
        "built for tensorrt 10.3.0.26, this is 10.7.0.23; built for CUDA 12.6, this is 13.0",
    ),
    "model": (key(model="b"), "no engine of this model has been built yet"),
}


@pytest.mark.parametrize("case", MISSES)
def test_a_miss_is_explained_by_the_nearest_engine(
    cache: EngineCache, stored: CachedEngine, case: str
) -> None:
    wanted, message = MISSES[case]
    miss = cache.find(wanted)
    assert isinstance(miss, Miss)
    assert miss.kind == "absent"
    assert miss.nearest == (None if case == "model" else stored.record)
    with pytest.raises(EngineMismatchError, match=f"{message}.*mmedge build"):
        cache.load(wanted)
    assert cache.get_or_build(wanted, lambda: built(OTHER_PLAN)).miss == miss
    assert cache.load(key()).plan == PLAN


def test_the_nearest_engine_differs_least(cache: EngineCache, stored: CachedEngine) -> None:
    cache.store(replace(key(version="9.0"), cuda="11.8", driver="1"), built())
    cache.store(key(backend="tensorrt-rtx", version="10.7.0.23"), built())
    cache.store(key(model="c", version="10.7.0.23"), built())
    miss = cache.find(key(version="10.7.0.23"))
    assert isinstance(miss, Miss)
    assert miss.nearest == stored.record


def test_an_absent_folder_is_an_empty_cache(cache: EngineCache) -> None:
    miss = cache.find(key())
    assert isinstance(miss, Miss)
    assert (miss.kind, miss.reason) == ("absent", "no engine of this model has been built yet")
    with pytest.raises(
        EngineMismatchError, match="not there: no engine of this model has been built yet"
    ):
        cache.load(key())
    assert cache.entries() == ()
    assert not cache.folder.exists()


RTX = {"backend": "tensorrt-rtx", "version": "1.7"}


@pytest.mark.parametrize(
    ("targets", "wanted", "found"),
    [
        (("any",), key(**RTX, capability="7.5"), False),
        *((("any",), key(**RTX, capability=name), True) for name in ("8.0", "8.9", "12.0")),
        (("8.0",), key(**RTX, capability="8.9"), False),
        (("8.9", "12.0"), key(**RTX, capability="8.9"), True),
        (("8.9", "12.0"), key(**RTX, capability="7.5"), False),
        (("8.9", "12.0"), key(backend="tensorrt-rtx", version="1.8", capability="8.9"), False),
        (("8.9", "12.0"), key(backend="tensorrt", version="1.7", capability="8.9"), False),
        (("8.9", "12.0"), key(**RTX, capability="8.9", model="b"), False),
        (
            ("8.9", "12.0"),
            replace(
                key(**RTX, capability="8.9"),
                request=EngineRequest("tensorrt-rtx", (), (profile(9),)),
            ),
            False,
        ),
    ],
)
def test_a_portable_engine_runs_on_the_gpus_it_was_built_for(
    cache: EngineCache, targets: tuple[str, ...], wanted: EngineKey, found: bool
) -> None:
    cache.store(key(**RTX, targets=targets), built())
    assert isinstance(cache.find(wanted), CachedEngine) == found


def test_the_most_specific_engine_is_found(cache: EngineCache) -> None:
    here = key(**RTX, capability="8.9")
    for targets in (("any",), ("8.9", "12.0")):
        portable = cache.store(key(**RTX, targets=targets), built(OTHER_PLAN))
    assert cache.find(here) == portable
    exact = cache.store(here, built())
    assert cache.find(here) == exact


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def let_others_write(path: Path) -> None:
    path.chmod(0o666)


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def of_another(path: Path) -> None:
    document = json.loads(path.read_text())
    document["key"]["version"] = "10.3.0.27"
    path.write_text(json.dumps(document))


def with_no_range(path: Path) -> None:
    document = json.loads(path.read_text())
    document["key"]["request"]["profiles"][0]["ranges"]["x"]["min"] = [9, 3]
    path.write_text(json.dumps(document))


# File, damage and message.
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "plan changed": ("plan", flip, "its plan was changed"),
    "plan cut short": ("plan", cut, "its plan has 6999 bytes, expected 7000"),
    "plan grown": ("plan", lambda path: path.write_bytes(PLAN + b"!") and None, "has 7001 bytes"),
    "plan missing": ("plan", Path.unlink, "its plan is missing"),
    "plan a link": ("plan", link, "its plan is a link"),
    "plan open to others": ("plan", let_others_write, r"others \(mode 0666\)"),
    "record cut short": ("record", cut, "its record is damaged"),
    "record empty": ("record", lambda path: path.write_bytes(b"") and None, "record is damaged"),
    "record not UTF-8": ("record", lambda path: path.write_bytes(b"\xff") and None, "is damaged"),
    "record a link": ("record", link, "its record is a link"),
    "record open to others": ("record", let_others_write, r"others \(mode 0666\)"),
    "record of another key": ("record", of_another, "of another engine, or was changed"),
    "record with a field more": ("record", edit(path="/etc/passwd"), "path: Extra inputs"),
    "record of another plan": ("record", edit(plan_sha256="0" * 64), "its plan is missing"),
    "record with a path for a hash": ("record", edit(plan_sha256="../" * 21 + "x"), "plan_sha256"),
    "record with another size": ("record", edit(plan_size_bytes=6000), "expected 6000"),
    "record without end": ("record", edit(plan_size_bytes=1 << 60), "plan_size_bytes"),
    "record without a size": ("record", edit(plan_size_bytes=0), "plan_size_bytes"),
    "record of a word for a size": ("record", edit(plan_size_bytes="7000"), "plan_size_bytes"),
    "record of endless time": ("record", edit(duration_s=float("inf")), "its record is damaged"),
    "record of another format": ("record", edit(format=2), "format"),
    "record with no range": ("record", with_no_range, "min <= opt"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_engine_is_replaced(cache: EngineCache, stored: CachedEngine, kind: str) -> None:
    what, damage, message = DAMAGE[kind]
    damage(stored.path if what == "plan" else record_path(cache))
    with pytest.raises(EngineMismatchError, match=f"is damaged and not loaded: .*{message}"):
        cache.load(key())
    with pytest.warns(RuntimeWarning, match=f"fp16: the engine .* is not loaded: .*{message}"):
        rebuilt = cache.get_or_build(key(), lambda: built(OTHER_PLAN), label="fp16")
    assert rebuilt.miss is not None
    assert rebuilt.miss.kind == "damaged"
    assert rebuilt.path is not None
    assert cache.load(key()).plan == OTHER_PLAN
    assert sorted(cache.folder.iterdir()) == sorted([rebuilt.path, record_path(cache)])
    outside = cache.folder.parents[1] / "outside"
    if outside.exists():  # what a link led to is as it was
        assert OTHER_PLAN not in outside.read_bytes()


def test_a_pipe_as_a_record_is_refused(cache: EngineCache, stored: CachedEngine) -> None:
    record_path(cache).unlink()
    os.mkfifo(record_path(cache))
    with pytest.raises(EngineMismatchError, match="its record is no regular file"):
        cache.load(key())


def test_an_oversized_record_is_refused(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_files, "MAX_RECORD_BYTES", 100)
    with pytest.raises(EngineMismatchError, match="expected at most 100"):
        cache.load(key())


@given(st.data())
def test_a_changed_record_is_refused_at_most(data: st.DataObject) -> None:
    record = record_of(key(), built(), "label").model_copy(update={"built_unix_s": 1e9})
    document = record.model_dump_json().encode()
    position = data.draw(st.integers(0, len(document) - 1))
    changed = document[:position] + data.draw(st.binary(max_size=3)) + document[position + 1 :]
    try:
        parsed = parse_record(changed, key_digest(key()))
    except RecordError:
        return
    assert parsed.key == key()


@pytest.mark.parametrize("moment", ["parse_record", "stat_private", "read_private"])
def test_an_engine_replaced_during_a_lookup_is_found(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The record that is read may be of a plan that is gone when it is looked for or read."""
    step: Callable[..., object] = getattr(engine_files, moment)

    def replaced_meanwhile(*arguments: object) -> object:
        if moment == "read_private" and arguments[0] != stored.path:
            return step(*arguments)
        monkeypatch.setattr(engine_files, moment, step)
        cache.store(key(), built(OTHER_PLAN))
        return step(*arguments)

    monkeypatch.setattr(engine_files, moment, replaced_meanwhile)
    assert cache.load(key()).plan == OTHER_PLAN
    assert not stored.path.exists()


def test_a_folder_that_others_can_write_is_refused(
    cache: EngineCache, stored: CachedEngine
) -> None:
    cache.folder.chmod(0o770)
    attempts: list[Callable[[], object]] = [
        lambda: cache.find(key()),
        lambda: cache.load(key()),
        lambda: cache.get_or_build(key(), never),
        lambda: cache.store(key(), built()),
        cache.entries,
        cache.prune,
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"by others \(mode 0770\).*chmod -R go-w"):
            attempt()


def test_a_folder_that_others_can_replace_is_refused(
    cache: EngineCache, stored: CachedEngine
) -> None:
    cache.folder.parent.chmod(0o777)
    with pytest.raises(StorageError, match=r"mode 0777.*MMEDGE_CACHE_DIR"):
        cache.get_or_build(key(), never)
    cache.folder.parent.chmod(0o1777)  # as /tmp is: one's own entries are safe there
    cache.load(key())


def test_a_folder_of_another_user_is_refused(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmedge.files.private._trusted", lambda _: False)
    with pytest.raises(StorageError, match=r"belongs to user \d+.*chown"):
        cache.get_or_build(key(), never)


def test_a_linked_folder_is_judged_by_where_it_leads(
    cache: EngineCache, stored: CachedEngine, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(cache.folder)
    linked = EngineCache(tmp_path / "link")
    assert linked.load(key()).plan == PLAN
    cache.folder.chmod(0o777)
    with pytest.raises(StorageError, match="by others"):
        linked.load(key())


def test_without_a_folder_the_engine_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    cache = EngineCache(tmp_path / "file" / "engines")
    with pytest.raises(StorageError, match="file"):
        cache.store(key(), built())
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}/file/engines.*MMEDGE_CACHE_DIR"):
        engine = cache.get_or_build(key(), built)
    assert (engine.plan, engine.path) == (PLAN, None)
    with pytest.raises(StorageError, match="file"):
        cache.get_or_build(key(), never, or_in_memory=False)
    assert (tmp_path / "file").read_bytes() == b"mine"


def refuse(code: int) -> Callable[..., int]:
    def fail(path: object, *_: object) -> int:
        raise OSError(code, os.strerror(code), str(path))

    return fail


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied")]
)
def test_a_read_only_cache(
    cache: EngineCache,
    stored: CachedEngine,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    message: str,
) -> None:
    # A root that runs the tests is not stopped by modes.
    monkeypatch.setattr(key_lock, "_open_and_try", refuse(code))
    monkeypatch.setattr(os, "utime", refuse(code))
    assert cache.get_or_build(key(), never).plan == PLAN
    with pytest.warns(RuntimeWarning, match=f"{message}.*MMEDGE_CACHE_DIR"):
        other = cache.get_or_build(key(model="b"), built)
    assert (other.plan, other.path) == (PLAN, None)
    with pytest.raises(StorageError, match=message):
        cache.store(key(model="b"), built())
    with pytest.raises(StorageError, match=message):
        cache.prune(PruneRule(everything=True))


def test_an_unreadable_folder(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", refuse(errno.EACCES))
    with pytest.raises(StorageError, match="Cannot read the engine cache"):
        cache.find(key(model="b"))
    with pytest.warns(RuntimeWarning, match="Cannot read the engine cache"):
        assert cache.get_or_build(key(model="b"), built).path is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_older_engine(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(atomic, "_sync", refuse(code))
    with pytest.raises(StorageError, match="disk"):
        cache.store(key(), built(OTHER_PLAN))
    with pytest.warns(RuntimeWarning, match="disk .*MMEDGE_CACHE_DIR"):
        other = cache.get_or_build(key(model="b"), built)
    assert (other.plan, other.path) == (PLAN, None)
    with pytest.raises(StorageError, match="disk"):
        cache.get_or_build(key(model="b"), built, or_in_memory=False)
    monkeypatch.undo()
    assert cache.load(key()).plan == PLAN
    assert sorted(cache.folder.iterdir()) == sorted([stored.path, record_path(cache)])


def test_timing_and_runtime_caches_have_separate_paths(cache: EngineCache, tmp_path: Path) -> None:
    places = [
        cache.timing_cache("tensorrt", "10.3.0", "8.7"),
        cache.timing_cache("tensorrt", "10.3.0", "8.9"),
        cache.timing_cache("tensorrt-rtx", "10.3.0", "8.9"),
        cache.runtime_cache("tensorrt-rtx", "1.7.1", "NVIDIA RTX 4090/../x 8.9 580.95"),
        cache.runtime_cache("tensorrt-rtx", "1.7.2", "NVIDIA RTX 4090/../x 8.9 580.95"),
    ]
    assert len(set(places)) == 5
    for place in places:
        place.write_bytes(b"timings")
        assert place.parent.parent == cache.folder
        assert place.parent.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()  # where no folder can be made
    place = EngineCache(tmp_path / "file").timing_cache("tensorrt", "10.3.0", "8.7")
    assert place.name == places[0].name == "tensorrt-10.3.0-8.7.cache"
