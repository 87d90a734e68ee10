"""Finished candidates on disk: what was written is found again, and nothing else is trusted."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trials_of import built, figure, quality, speed

from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.methods.configs import WeightOnly
from mmedge.converters.methods.recipes import FP32, parse_recipe
from mmedge.converters.tuning.pareto import Trial
from mmedge.converters.tuning.trials import TrialStore
from mmedge.errors import ConversionError, StorageError
from mmedge.files import sha256_file

KEY = {"weights_sha256": "abc", "seed": 0}
ROLE, NAME = "image_encoder", "int8-static-keep2"
RECIPE = parse_recipe(NAME)


@contextmanager
def interrupted(folder: Path, key: Mapping[str, object] = KEY) -> Iterator[TrialStore]:
    """A search that does not come to its end."""
    store = TrialStore(folder, key)
    try:
        yield store
    finally:
        store.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def finished(folder: Path) -> Trial:
    made = built(NAME, folder, keep=("layers.0.fc1", "layers.1.fc2"))
    return Trial(made.recipe, made, quality(0.004), figure(0.004), 1234, speed(0.4), "", 3.5)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A search folder with one finished candidate."""
    folder = tmp_path / ".x.mmedge.search"
    with interrupted(folder) as store:
        store.save(ROLE, finished(store.role_folder(ROLE)))
    return folder


def lost(quality: Quality | None) -> Figure:
    return figure(0.0) if quality is None else quality.drops["recall@1"]


def load(folder: Path) -> Trial | None:
    with interrupted(folder) as store:
        return store.load(ROLE, RECIPE, lost)


def test_written_data_is_found_again(work: Path) -> None:
    found = load(work)
    assert found is not None
    assert found.built is not None
    expected = built(NAME, work.parent / "other")
    assert found.built.models == {
        "onnxruntime": work / ROLE / f"{NAME}.onnxruntime.onnx",
        "portable": work / ROLE / f"{NAME}.portable.onnx",
    }
    assert found.built.nodes == work / ROLE / f"{NAME}.nodes.json"
    for ours, theirs in (
        (found.built.golden, expected.golden),
        (found.built.collected, expected.collected),
    ):
        assert ours.keys() == theirs.keys() == {"embedding"}
        np.testing.assert_array_equal(ours["embedding"], theirs["embedding"])
    assert (found.built.opset, found.built.duration_s) == (20, 1.5)
    assert found.built.parity == expected.parity
    assert (found.quality, found.speed) == (quality(0.004), speed(0.4))
    assert (found.size_bytes, found.failure, found.duration_s) == (1234, "", 3.5)
    for method in found.recipe.methods.values():
        assert method.keep == ("layers.0.fc1", "layers.1.fc2")  # type: ignore[union-attr]
    assert found.recipe == found.built.recipe


def test_layers_that_a_size_target_lowered_are_found_again(work: Path) -> None:
    name = "int4-at25-keep1"
    recipe = parse_recipe(name)
    with interrupted(work) as store:
        made = built(name, store.role_folder(ROLE), keep=("layers.0.fc1",))
        (method,) = made.recipe.methods.values()
        assert isinstance(method, WeightOnly)
        lowered = replace(method, lowered=("layers.1.fc1", "layers.1.fc2"))
        made = replace(made, recipe=replace(made.recipe, methods={"onnxruntime": lowered}))
        store.save(ROLE, Trial(made.recipe, made, None, None, 1234, speed(0.4), "", 3.5))
    with interrupted(work) as store:
        found = store.load(ROLE, recipe, lost)
    assert found is not None
    assert found.recipe == made.recipe


def test_the_drop_has_the_given_size(work: Path) -> None:
    found = load(work)
    assert found is not None
    assert found.drop == quality(0.004).drops["recall@1"]


def test_a_failure_is_found_again(work: Path) -> None:
    recipe = parse_recipe("bf16")
    with interrupted(work) as store:
        store.save(ROLE, Trial(recipe, None, None, None, None, None, "no kernel", 0.5))
    with TrialStore(work, KEY) as store:
        found = store.load(ROLE, recipe, lost)
        assert found == Trial(recipe, None, None, None, None, None, "no kernel", 0.5)
        assert store.load(ROLE, FP32, lost) is None
        assert store.load("text_encoder", recipe, lost) is None


def test_files_are_hashed_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("mmedge.converters.tuning.trials.sha256_file", noted)
    with interrupted(work) as store:
        first, second = (store.load(ROLE, RECIPE, lost) for _ in range(2))
    assert first is not None
    assert second is not None
    assert second.quality == first.quality
    assert len(hashed) == len(set(hashed)) > 2


def test_another_search_begins_from_nothing(work: Path) -> None:
    with interrupted(work, {**KEY, "seed": 1}) as store:
        assert store.load(ROLE, RECIPE, lost) is None
        assert [path.name for path in work.iterdir()] == ["key.json"]
    assert load(work) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_a_damaged_key_is_another_search(work: Path, content: bytes) -> None:
    (work / "key.json").write_bytes(content)
    assert load(work) is None
    assert [path.name for path in work.iterdir()] == ["key.json"]


def test_a_search_that_ends_well_leaves_nothing(work: Path) -> None:
    with TrialStore(work, KEY) as store:
        assert store.load(ROLE, RECIPE, lost) is not None
    assert not work.exists()


def _drop_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_drop_half, _flip_a_bit, _empty, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        f"{NAME}.trial.json",
        f"{NAME}.trial.npz",
        f"{NAME}.portable.onnx",
        f"{NAME}.portable.onnx.data",
        f"{NAME}.onnxruntime.onnx.data",
        f"{NAME}.nodes.json",
    ],
)
def test_a_changed_cache_is_rebuilt(name: str, damage: Callable[[Path], None], work: Path) -> None:
    damage(work / ROLE / name)
    assert load(work) is None


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"trial": 3, "sha256": ""}', "1e999"])
def test_json_of_another_kind_is_made_again(content: str, work: Path) -> None:
    (work / ROLE / f"{NAME}.trial.json").write_text(content)
    assert load(work) is None


def test_figures_that_were_changed_by_hand_are_not_believed(work: Path) -> None:
    path = work / ROLE / f"{NAME}.trial.json"
    document = json.loads(path.read_text())
    document["trial"]["quality"]["drops"]["recall@1"]["value"] = -1.0
    path.write_text(json.dumps(document))
    assert load(work) is None


def test_nothing_is_unpickled(work: Path) -> None:
    path = work / ROLE / f"{NAME}.trial.npz"
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"golden/embedding", "collected/embedding"}
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype("float32")}
    np.savez(path, **{"golden/embedding": np.array([object()])})
    assert load(work) is None
    path.write_bytes(pickle.dumps({"golden": 1}))
    assert load(work) is None


_HOLD = """
import sys
from pathlib import Path
from mmedge.converters.tuning.trials import TrialStore
store = TrialStore(Path(sys.argv[1]), {})
print("held", flush=True)
sys.stdin.read()
"""


def test_one_search_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / ".x.mmedge.search"
    command = [sys.executable, "-c", _HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConversionError, match=r"another process is searching.*-o"):
            TrialStore(folder, {})
        other.kill()
        other.wait()
    with TrialStore(folder, {}) as store:  # the kernel dropped the lock of the killed one
        store.role_folder(ROLE)


def test_a_place_that_is_taken_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("keep me")
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(target)
    for place in (file, link):
        with pytest.raises(StorageError):
            TrialStore(place, KEY)
    assert (target / "precious").read_text() == "keep me"
