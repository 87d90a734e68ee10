"""The engine cache: what is found, why something is not, and that nothing damaged is loaded."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cached import OTHER_PLAN, PLAN, built, key, profile
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mmedge.errors import BackendError, EngineMismatchError, InputError, StorageError
from mmedge.files import atomic
from mmedge.files import locks as key_lock
from mmedge.files.cache_folder import cache_folder
from mmedge.runtimes.engines import files as engine_files
from mmedge.runtimes.engines.model_hash import model_label
from mmedge.runtimes.engines.record import RecordError, key_digest, parse_record, record_of
from mmedge.runtimes.engines.spec import (
    BuildHost,
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


def test_the_folder_is_the_owners_alone_whatever_the_umask(cache: EngineCache) -> None:
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


def test_the_folder_lies_where_all_caches_lie() -> None:
    assert EngineCache().folder == cache_folder() / "engines"


def test_what_fails_to_build_leaves_nothing_and_can_be_tried_again(cache: EngineCache) -> None:
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


def test_storing_again_replaces_the_engine_and_leaves_nothing_of_the_old(
    cache: EngineCache, stored: CachedEngine
) -> None:
    again = cache.store(key(), built(OTHER_PLAN))
    assert cache.load(key()).plan == OTHER_PLAN
    assert not stored.path.exists()
    assert sorted(cache.folder.iterdir()) == sorted([again.path, record_path(cache)])


# What differs from key(), and how it is told.
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
        r"built for 'x' from \(1, 3\) over .* to \(8, 3\), asked for .* to \(32, 3\)",
    ),
    "profiles": (
        replace(key(), request=replace(key().request, profiles=(profile(1), profile(8)))),
        "built with 1 shape profiles, asked for 2",
    ),
    "settings": (
        replace(
            key(), request=replace(key().request, settings=BuildSettings(workspace_bytes=1 << 20))
        ),
        "built with workspace_bytes 1073741824, asked for 1048576",
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
    wanted, told = MISSES[case]
    miss = cache.find(wanted)
    assert isinstance(miss, Miss)
    assert miss.kind == "absent"
    assert miss.nearest == (None if case == "model" else stored.record)
    with pytest.raises(EngineMismatchError, match=f"{told}.*mmedge build"):
        cache.load(wanted)
    assert cache.get_or_build(wanted, lambda: built(OTHER_PLAN)).miss == miss
    assert cache.load(key()).plan == PLAN


def test_the_nearest_is_the_one_that_differs_least(
    cache: EngineCache, stored: CachedEngine
) -> None:
    cache.store(replace(key(version="9.0"), cuda="11.8", driver="1"), built())
    cache.store(key(backend="tensorrt-rtx", version="10.7.0.23"), built())
    cache.store(key(model="c", version="10.7.0.23"), built())
    miss = cache.find(key(version="10.7.0.23"))
    assert isinstance(miss, Miss)
    assert miss.nearest == stored.record


def test_without_a_folder_there_is_nothing(cache: EngineCache) -> None:
    miss = cache.find(key())
    assert isinstance(miss, Miss)
    assert (miss.kind, miss.reason) == ("absent", "no engine of this model has been built yet")
    with pytest.raises(
        EngineMismatchError, match="not there: no engine of this model has been built yet"
    ):
        cache.load(key())
    assert cache.entries() == ()
    assert not cache.folder.exists()


def test_a_portable_engine_serves_each_of_its_gpus(cache: EngineCache) -> None:
    here = key(backend="tensorrt-rtx", version="1.7", capability="8.9")
    for targets in (("any",), ("8.0",), ("8.9", "12.0")):
        stored = cache.store(
            key(backend="tensorrt-rtx", version="1.7", targets=targets), built(OTHER_PLAN)
        )
        assert (cache.find(here) == stored) == (targets != ("8.0",))
    # The narrower class goes before "any", and the engine of this very GPU before both.
    assert cache.load(here).record.key.compute_capability == "8.9+12.0"
    exact = cache.store(here, built())
    assert cache.find(here) == exact


def test_any_stands_for_gpus_from_ampere_on(cache: EngineCache) -> None:
    cache.store(key(backend="tensorrt-rtx", version="1.7", targets=("any",)), built())
    for capability, served in (("7.5", False), ("8.0", True), ("8.9", True), ("12.0", True)):
        found = cache.find(key(backend="tensorrt-rtx", version="1.7", capability=capability))
        assert isinstance(found, CachedEngine) == served


@pytest.mark.parametrize(
    "wanted",
    [
        key(backend="tensorrt-rtx", version="1.8", capability="8.9"),
        key(backend="tensorrt-rtx", version="1.7", capability="7.5"),
        key(backend="tensorrt-rtx", version="1.7", capability="8.9", model="b"),
        replace(
            key(backend="tensorrt-rtx", version="1.7", capability="8.9"),
            request=EngineRequest("tensorrt-rtx", (), (profile(9),)),
        ),
        key(backend="tensorrt", version="1.7", capability="8.9"),
    ],
    ids=["version", "gpu", "model", "shapes", "backend"],
)
def test_a_portable_engine_serves_nothing_else(cache: EngineCache, wanted: EngineKey) -> None:
    cache.store(key(backend="tensorrt-rtx", version="1.7", targets=("8.9", "12.0")), built())
    assert isinstance(cache.find(wanted), Miss)


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


# Which file is damaged how, and what is said of it.
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
def test_what_is_damaged_is_not_loaded_but_replaced(
    cache: EngineCache, stored: CachedEngine, kind: str
) -> None:
    what, damage, told = DAMAGE[kind]
    damage(stored.path if what == "plan" else record_path(cache))
    with pytest.raises(EngineMismatchError, match=f"is damaged and not loaded: .*{told}"):
        cache.load(key())
    with pytest.warns(RuntimeWarning, match=f"fp16: the engine .* is not loaded: .*{told}"):
        rebuilt = cache.get_or_build(key(), lambda: built(OTHER_PLAN), label="fp16")
    assert rebuilt.miss is not None
    assert rebuilt.miss.kind == "damaged"
    assert rebuilt.path is not None
    assert cache.load(key()).plan == OTHER_PLAN
    assert sorted(cache.folder.iterdir()) == sorted([rebuilt.path, record_path(cache)])
    outside = cache.folder.parents[1] / "outside"
    if outside.exists():  # what a link led to is as it was
        assert OTHER_PLAN not in outside.read_bytes()


def test_a_pipe_for_a_record_is_not_waited_on(cache: EngineCache, stored: CachedEngine) -> None:
    record_path(cache).unlink()
    os.mkfifo(record_path(cache))
    with pytest.raises(EngineMismatchError, match="its record is no regular file"):
        cache.load(key())


def test_a_record_without_end_is_not_read(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_files, "MAX_RECORD_BYTES", 100)
    with pytest.raises(EngineMismatchError, match="expected at most 100"):
        cache.load(key())


@given(st.data())
def test_no_change_of_a_record_does_more_than_refuse_it(data: st.DataObject) -> None:
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
def test_an_engine_replaced_while_it_is_looked_up_is_found(
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


def test_a_folder_that_others_can_exchange_is_refused(
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


def test_where_no_folder_can_be_made_the_engine_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    cache = EngineCache(tmp_path / "file" / "engines")
    with pytest.raises(StorageError, match="file"):
        cache.store(key(), built())
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}/file/engines.*MMEDGE_CACHE_DIR"):
        engine = cache.get_or_build(key(), built)
    assert (engine.plan, engine.path) == (PLAN, None)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_who_needs_it_kept_is_told_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    cache = EngineCache(tmp_path / "file" / "engines")
    with pytest.raises(StorageError, match="file"):
        cache.get_or_build(key(), never, or_in_memory=False)


def refuse(code: int) -> Callable[..., int]:
    def fail(path: object, *_: object) -> int:
        raise OSError(code, os.strerror(code), str(path))

    return fail


@pytest.mark.parametrize(
    ("code", "told"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied")]
)
def test_a_cache_that_can_only_be_read_serves_what_it_has(
    cache: EngineCache,
    stored: CachedEngine,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    told: str,
) -> None:
    # A root that runs the tests is not stopped by modes.
    monkeypatch.setattr(key_lock, "_open_and_try", refuse(code))
    monkeypatch.setattr(os, "utime", refuse(code))
    assert cache.get_or_build(key(), never).plan == PLAN
    with pytest.warns(RuntimeWarning, match=f"{told}.*MMEDGE_CACHE_DIR"):
        other = cache.get_or_build(key(model="b"), built)
    assert (other.plan, other.path) == (PLAN, None)
    with pytest.raises(StorageError, match=told):
        cache.store(key(model="b"), built())
    with pytest.raises(StorageError, match=told):
        cache.prune(PruneRule(everything=True))


def test_a_folder_that_cannot_be_read_is_told_as_one_that_cannot_be_used(
    cache: EngineCache, stored: CachedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", refuse(errno.EACCES))
    with pytest.raises(StorageError, match="Cannot read the engine cache"):
        cache.find(key(model="b"))
    with pytest.warns(RuntimeWarning, match="Cannot read the engine cache"):
        assert cache.get_or_build(key(model="b"), built).path is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_the_older_engine(
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


LIMITED = """
import resource, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cached import built, key
from mmedge.errors import StorageError
from mmedge.runtimes.engines.store import EngineCache

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
cache = EngineCache(Path(sys.argv[1]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    engine = cache.get_or_build(key(), lambda: built(b"1" * 100_000))
assert (len(engine.plan), engine.path) == (100_000, None)
print(*(warning.message for warning in caught))
try:
    cache.store(key(), built(b"1" * 100_000))
except StorageError as error:
    print(error)
"""


def test_a_disk_without_room_for_the_plan(cache: EngineCache) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(cache.folder), str(Path(__file__).parent)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    warned, raised = done.stdout.splitlines()
    assert warned.startswith(f"The engine cache {cache.folder} cannot be written, so this engine")
    assert "the file would be too large" in warned
    assert "MMEDGE_CACHE_DIR" in warned
    assert raised.startswith(f"Cannot write {cache.folder}")
    assert list(cache.folder.iterdir()) == []


def save_model(path: Path, *, weight: float = 1.0, external: bool = True) -> Path:
    """An ONNX file that adds a weight, which lies beside it."""
    tensor = numpy_helper.from_array(np.full(64, weight, np.float32), "w")
    shape: list[str | int] = ["batch", 64]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_suffix(".data")
    data.unlink(missing_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=data.name,
        size_threshold=0,
    )
    return path


def key_of(model: Path, *targets: str, backend: str = "tensorrt", **here: str) -> EngineKey:
    request = EngineRequest(backend, targets, (profile(),))
    versions = {"version": "10.3", "cuda": "12.6", "driver": "540.4", "compute_capability": "8.7"}
    return EngineCache().key_for(model, request, BuildHost(**{**versions, **here}))


def test_a_key_holds_whatever_the_engine_depends_on(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    found = key_of(model)
    assert found == key_of(model)
    assert (found.version, found.cuda, found.driver) == ("10.3", "12.6", "540.4")
    assert found.compute_capability == "8.7"
    moved = save_model(tmp_path / "elsewhere" / "m.onnx")
    assert key_digest(key_of(moved)) == key_digest(found)
    digests = {
        key_digest(other)
        for other in (
            found,
            key_of(model, version="10.4"),
            key_of(model, cuda="12.7"),
            key_of(model, driver="550"),
            key_of(model, compute_capability="8.9"),
            key_of(model, backend="tensorrt-rtx"),
            replace(found, request=replace(found.request, profiles=(profile(9),))),
            replace(found, request=replace(found.request, settings=BuildSettings(stripped=True))),
        )
    }
    assert len(digests) == 8


def test_the_weights_beside_a_model_are_part_of_it(tmp_path: Path) -> None:
    first = key_of(save_model(tmp_path / "m.onnx"))
    graph = (tmp_path / "m.onnx").read_bytes()
    second = key_of(save_model(tmp_path / "m.onnx", weight=2.0))
    assert (tmp_path / "m.onnx").read_bytes() == graph
    assert first.model_sha256 != second.model_sha256
    inside = key_of(save_model(tmp_path / "m.onnx", external=False))
    assert inside.model_sha256 not in (first.model_sha256, second.model_sha256)


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_model_that_cannot_be_read_has_no_key(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BackendError, match=r"m\.onnx"):
        key_of(tmp_path / "m.onnx")


def test_a_model_without_its_weights_has_no_key(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    model.with_suffix(".data").unlink()
    with pytest.raises(BackendError, match=r"'m\.data' is missing"):
        key_of(model)


def test_a_portable_engine_depends_on_no_gpu_driver_or_cuda(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m.onnx")
    there = key_of(model, "12.0", "8.9", backend="tensorrt-rtx", compute_capability="", driver="")
    here = key_of(model, "8.9", "12.0", "8.9", backend="tensorrt-rtx")
    assert there == here
    assert (here.cuda, here.driver, here.compute_capability) == ("", "", "12.0+8.9")
    # One for the GPU at hand does.
    assert key_of(model, backend="tensorrt-rtx").driver == "540.4"


def test_without_any_gpu_there_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compute capability"):
        key_of(save_model(tmp_path / "m.onnx"), compute_capability="")


def test_a_label_tells_the_bundle_the_role_and_the_file(tmp_path: Path) -> None:
    model = tmp_path / "clip.mmedge" / "image_encoder" / "fp16.onnx"
    assert model_label(model) == "clip.mmedge/image_encoder/fp16.onnx"


def test_timing_and_runtime_caches_have_a_place_each(cache: EngineCache) -> None:
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
    assert places[0].name == "tensorrt-10.3.0-8.7.cache"


def test_their_place_is_told_also_where_it_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = EngineCache(tmp_path / "file").timing_cache("tensorrt", "10.3", "8.7")
    assert place.name == "tensorrt-10.3-8.7.cache"
