"""Pruning of the engine cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from cached import PLAN, built, key

from mmedge.errors import InputError
from mmedge.runtimes.engines.record import key_digest
from mmedge.runtimes.engines.store import EngineCache, Miss, PruneRule

DAY_S = 86_400.0
MODELS = "abc"  # most recently used first, a day apart


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    """Three engines of about 7 kB and 4 days, 3 days and 2 days of disuse, of models c, b and a."""
    cache = EngineCache(tmp_path / "engines")
    now = time.time()
    for age, model in enumerate(MODELS, start=2):
        cache.store(key(model=model), built(), label=f"{model}.mmedge/text_encoder/fp16.onnx")
        for path in cache.folder.glob(f"{key_digest(key(model=model))}*"):
            os.utime(path, (now - age * DAY_S,) * 2)
    return cache


def there(cache: EngineCache) -> str:
    return "".join(model for model in MODELS if not isinstance(cache.find(key(model=model)), Miss))


def test_entries_are_listed_most_recently_used_first(cache: EngineCache) -> None:
    found = cache.entries()
    labels = [entry.record.label[0] for entry in found if entry.record is not None]
    assert labels == ["a", "b", "c"]
    assert all(entry.fault == "" and not entry.busy for entry in found)
    assert all(len(PLAN) < entry.size_bytes < len(PLAN) + 2000 for entry in found)


def test_loading_counts_as_use(cache: EngineCache) -> None:
    cache.load(key(model="c"))
    first = cache.entries()[0]
    assert first.digest == key_digest(key(model="c"))
    assert first.used_unix_s == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("rule", "left", "reason"),
    [
        (PruneRule(), "abc", ""),
        (PruneRule(older_than_s=2.5 * DAY_S), "a", "not used for 3.0 days"),
        (PruneRule(older_than_s=30 * DAY_S), "abc", ""),
        (PruneRule(older_than_s=0), "", "not used for 2.0 days"),
        (PruneRule(model="b.mmedge"), "ac", "of the model 'b.mmedge'"),
        (PruneRule(model="text_encoder"), "", "of the model 'text_encoder'"),
        (PruneRule(model="c" * 12), "ab", "of the model 'cccccccccccc'"),
        (PruneRule(model="no such"), "abc", ""),
        (PruneRule(keep_bytes=20_000), "ab", "least recently used"),
        (PruneRule(keep_bytes=9_000), "a", "least recently used"),
        (PruneRule(keep_bytes=0), "", "least recently used"),
        (PruneRule(keep_bytes=100_000), "abc", ""),
        (PruneRule(keep_bytes=9_000, model="a.mmedge"), "b", "of the model"),
        (PruneRule(versions={"tensorrt": "10.7"}), "", "tensorrt 10.3.0.26, this is 10.7"),
        (PruneRule(versions={"tensorrt": "10.7"}, stale=False), "abc", ""),
        (PruneRule(versions={"tensorrt": "10.3.0.26", "tensorrt-rtx": "1.7"}), "abc", ""),
        (PruneRule(everything=True), "", "everything goes"),
    ],
)
def test_rules(cache: EngineCache, rule: PruneRule, left: str, reason: str) -> None:
    sizes = {entry.digest: entry.size_bytes for entry in cache.entries()}
    planned = cache.prune(rule, dry_run=True)
    assert there(cache) == "abc"
    done = cache.prune(rule)
    assert [(entry.digest, why) for entry, why in planned.removed] == [
        (entry.digest, why) for entry, why in done.removed
    ]
    assert there(cache) == left
    gone = {key_digest(key(model=model)) for model in MODELS if model not in left}
    assert {entry.digest for entry, _ in done.removed} == gone
    assert done.freed_bytes == planned.freed_bytes == sum(sizes[digest] for digest in gone)
    assert done.kept == len(left)
    if reason:
        assert reason in done.removed[0][1]
    assert len(list(cache.folder.iterdir())) == 2 * len(left)


@pytest.mark.parametrize("stale", [True, False])
def test_damaged_engines_are_stale(cache: EngineCache, stale: bool) -> None:
    found = cache.find(key(model="b"))
    assert not isinstance(found, Miss)
    found.path.write_bytes(PLAN[:-1] + b"?")  # of the right size: only its hash tells
    (cache.folder / f"{key_digest(key(model='c'))}.json").write_bytes(b"{")
    assert [entry.fault for entry in cache.entries(verify=True)].count("") == 1
    assert [entry.fault for entry in cache.entries()].count("") == 2
    pruned = cache.prune(PruneRule(stale=stale))
    assert len(pruned.removed) == (2 if stale else 0)
    assert there(cache) == ("a" if stale else "ab")


def test_everything_includes_timing_and_runtime_caches(cache: EngineCache) -> None:
    places = [
        cache.timing_cache("tensorrt", "10.3", "8.7"),
        cache.runtime_cache("tensorrt-rtx", "1.7", "gpu"),
    ]
    for place in places:
        place.write_bytes(b"12345")
    engines_bytes = sum(entry.size_bytes for entry in cache.entries())
    mine = cache.folder / "notes.txt"
    mine.write_text("mine")
    cache.prune()
    assert all(place.exists() for place in places)
    assert cache.prune(PruneRule(everything=True), dry_run=True).freed_bytes == engines_bytes + 10
    assert all(place.exists() for place in places)
    assert cache.prune(PruneRule(everything=True)).freed_bytes == engines_bytes + 10
    assert not any(place.exists() for place in places)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("older_than_s", -1.0), ("keep_bytes", -1), ("older_than_s", float("nan")), ("model", "")],
)
def test_wrong_rules_are_refused(field: str, wrong: object) -> None:
    with pytest.raises(InputError, match=field):
        PruneRule(**{field: wrong})  # type: ignore[arg-type]
