"""Labels taught by example: whitened prototypes, unknown things, files, and the gate on reload."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import write_images

import mmedge
from mmedge.bundle import Bundle
from mmedge.errors import InputError, SpaceMismatchError
from mmedge.files.safetensors_file import read_safetensors, write_safetensors
from mmedge.models import DualEncoder
from mmedge.models.banks import PrototypeBank
from mmedge.models.features import Features
from mmedge.models.prototypes import Accuracy, Prototypes, measure_base
from mmedge.specs import Array, Modality

WIDTH, SPACE = 24, "tiny-space"


class World:
    """Classes in a space where most directions say nothing of the class."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = np.linspace(0.2, 4, WIDTH)  # the loud directions are the useless ones
        self.centres: dict[str, Array] = {}

    def rows(self, label: str, count: int) -> Array:
        if label not in self.centres:
            self.centres[label] = self.rng.standard_normal(WIDTH) * 0.8
        noise = self.rng.standard_normal((count, WIDTH)) * self.noise
        return (self.centres[label] + noise).astype(np.float32)


class Encoder:
    """As much of an encoder as a bank asks for: rows are their own features."""

    def __init__(self, space: str = SPACE) -> None:
        self.taps = {Modality.IMAGE: {"embedding": space}}

    def extract(self, rows: Array) -> Features:
        return Features(Modality.IMAGE, {"embedding": rows}, {}, self.taps[Modality.IMAGE])


@pytest.fixture
def world() -> World:
    return World()


def taught(world: World, shots: int, labels: str = "abcdef", *, base: bool = True) -> PrototypeBank:
    known = {f"known {at}": world.rows(f"known {at}", 60) for at in range(8)} if base else None
    encoder: Any = Encoder()
    bank = PrototypeBank.create("test", on=encoder, base=known)
    for label in labels:
        bank.add(label, world.rows(label, shots))
    return bank


def accuracy(bank: PrototypeBank, world: World) -> float:
    right = 0
    for label in bank.labels:
        answers = bank(bank._on.extract(world.rows(label, 50)))  # type: ignore[arg-type]
        right += sum(answer.nearest == label for answer in answers)
    return right / (50 * len(bank.labels))


def test_whitening_by_known_classes_finds_what_distinguishes(world: World) -> None:
    bank = taught(world, 2)
    plain = Prototypes.none(None)
    vectors, owners = bank._state.vectors, bank._state.owners
    for at, label in enumerate("abcdef"):
        plain = plain.with_rows(label, vectors[owners == at], ["x", "y"])
    rows = np.concatenate([world.rows(label, 50) for label in "abcdef"])
    raw = np.repeat(range(6), 50) == plain.similarities(rows).argmax(axis=1)
    assert accuracy(bank, world) > raw.mean() + 0.2
    assert bank.counts == dict.fromkeys("abcdef", 2)


def test_what_was_not_taught_is_unknown(world: World) -> None:
    bank = taught(world, 12)
    known = [answer.label for answer in bank(bank._on.extract(world.rows("a", 40)))]
    others = [
        answer.label
        for label in "uvwxyz"
        for answer in bank(bank._on.extract(world.rows(label, 40)))  # type: ignore[arg-type]
    ]
    assert known.count("a") > 20
    assert others.count(None) / len(others) > known.count(None) / len(known) + 0.2


@pytest.mark.parametrize("base", [True, False])
def test_leave_one_out_tells_what_new_frames_will_show(base: bool, world: World) -> None:
    bank = taught(world, 16, base=base)
    low, high = bank.accuracy.interval
    assert bank.accuracy.count == 96
    assert low - 0.1 < accuracy(bank, world) < high + 0.1  # not 1.0, as by frames seen


def test_the_interval_of_an_accuracy() -> None:
    low, high = Accuracy(9, 10).interval
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert Accuracy(10, 10).interval[1] == pytest.approx(1)
    assert str(Accuracy(9, 10)) == "0.900 (0.596 to 0.982, 10 frames)"


def test_frames_of_the_wrong_thing_are_named(world: World) -> None:
    world.noise = np.full(WIDTH, 0.1)
    bank = taught(world, 6)
    assert bank.outliers == ()
    bank.add("a", world.rows("b", 1), names=["a/IMG_7.jpg"])
    (outlier,) = bank.outliers
    assert str(outlier) == "a/IMG_7.jpg was taught as 'a' and looks like 'b'"


@pytest.mark.parametrize("base", [True, False])
def test_a_bank_survives_its_file(base: bool, world: World, tmp_path: Path) -> None:
    bank = taught(world, 4, "ab", base=base)
    bank.save(tmp_path / "x.bank")
    encoder: Any = Encoder()
    loaded = PrototypeBank.load(tmp_path / "x.bank", on=encoder)
    features = encoder.extract(world.rows("a", 5))
    assert loaded(features) == bank(features)
    assert (loaded.name, loaded.counts, loaded.threshold) == (
        "test", {"a": 4, "b": 4}, bank.threshold,
    )  # fmt: skip
    bank.save(tmp_path / "y.bank")
    assert (tmp_path / "x.bank").read_bytes() == (tmp_path / "y.bank").read_bytes()
    other: Any = Encoder("another-space")
    with pytest.raises(SpaceMismatchError, match="was taught on 'embedding' of tiny-space"):
        PrototypeBank.load(tmp_path / "x.bank", on=other)
    with pytest.raises(SpaceMismatchError, match="reads 'embedding' of tiny-space"):
        bank(other.extract(world.rows("a", 1)))


def test_labels_and_frames_need_not_be_valid_unicode(world: World, tmp_path: Path) -> None:
    bank = taught(world, 2, "ab")
    bank.add("größe", world.rows("c", 1), names=["größe/1.jpg"])
    bank.add("caf\udce9", world.rows("d", 1), names=["caf\udce9/1.jpg"])  # Latin-1 on a disk
    bank.save(tmp_path / "x.bank")
    again = PrototypeBank.load(tmp_path / "x.bank", on=bank._on)
    assert again.labels == bank.labels
    assert again._state.names == bank._state.names


def test_a_worse_bank_is_not_taken(world: World, tmp_path: Path) -> None:
    world.noise = np.full(WIDTH, 0.2)
    bank = taught(world, 6, "abc")
    better = taught(world, 8, "abc")
    better.save(tmp_path / "better.bank")
    bank.reload(tmp_path / "better.bank")
    assert len(bank) == 24
    worse = taught(world, 5, "abc")
    worse.add("a", world.rows("b", 3), names=["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    worse.save(tmp_path / "worse.bank")
    with pytest.raises(InputError, match=r"expected at least .*stays as it was.*taught as 'a'"):
        bank.reload(tmp_path / "worse.bank")
    with pytest.raises(InputError, match="margin: got NaN"):
        bank.reload(tmp_path / "worse.bank", margin=float("nan"))
    assert len(bank) == 24
    bank.reload(tmp_path / "worse.bank", margin=0.9)
    assert len(bank) == 18
    empty: Any = Encoder()
    PrototypeBank.create("none", on=empty).save(tmp_path / "empty.bank")
    with pytest.raises(InputError, match="is empty"):
        bank.reload(tmp_path / "empty.bank")


def test_labels_can_be_forgotten(world: World) -> None:
    bank = taught(world, 3, "abc")
    bank.remove("b")
    assert bank.counts == {"a": 3, "c": 3}
    with pytest.raises(InputError, match="Label 'b' is not taught"):
        bank.remove("b")
    bank.add("b", world.rows("b", 2))
    assert bank.labels == ("a", "c", "b")


def test_what_cannot_be_taught(world: World) -> None:
    encoder: Any = Encoder()
    bank = PrototypeBank.create("x", on=encoder)
    with pytest.raises(InputError, match="Bank 'x' is empty"):
        bank(encoder.extract(world.rows("a", 1)))
    rows = world.rows("a", 3)
    bank.add("a", rows)
    with pytest.raises(InputError, match=r"has one label, 'a', and no base: everything would"):
        bank(encoder.extract(rows))
    with pytest.raises(InputError, match="needs two labels and several frames"):
        _ = bank.accuracy
    with pytest.raises(InputError, match="frame 1 is taught already, as 'a' \\(frame 2\\)"):
        bank.add("b", rows[1:2])
    with pytest.raises(InputError, match="frame 3 is the same image as frame 1"):
        bank.add("b", np.concatenate([(new := world.rows("b", 2)), new[:1]]))
    with pytest.raises(InputError, match="not empty"):
        bank.add(" ", rows)
    with pytest.raises(InputError, match="names: got 1, expected 2"):
        bank.add("b", world.rows("b", 2), names=["one"])
    with pytest.raises(InputError, match=r"Tap 'patches': the image encoder has \['embedding'\]"):
        PrototypeBank.create("x", on=encoder, tap="patches")
    with pytest.raises(InputError, match="expected two or more of two or more each"):
        measure_base([rows])
    assert len(bank) == 3


def test_one_frame_each_without_a_base_answers_always(world: World) -> None:
    bank = taught(world, 1, "ab", base=False)
    assert bank.threshold == -1
    (answer,) = bank(bank._on.extract(world.rows("z", 1)))  # type: ignore[arg-type]
    assert answer.label == answer.nearest


def test_one_frame_each_has_no_outliers_and_makes_way_for_a_better_bank(
    world: World, tmp_path: Path
) -> None:
    bank, more = taught(world, 1, "ab"), taught(world, 3, "ab")
    assert (bank.measurable, bank.outliers) == (False, ())
    assert more.measurable
    more.save(tmp_path / "more.bank")
    bank.reload(tmp_path / "more.bank")
    assert len(bank) == 6


def damaged(path: Path, **changes: Any) -> None:
    arrays, about = read_safetensors(path, error=InputError)
    arrays |= {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    about |= {name: value for name, value in changes.items() if isinstance(value, str)}
    write_safetensors(path, arrays, about)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"labels": "["},
        {"labels": json.dumps(["a"])},
        {"labels": json.dumps(["a", "a"])},
        {"labels": json.dumps(["a", 3])},
        {"frames": json.dumps(["only one"])},
        {"owners": np.array([0, 0, 1, 2])},
        {"owners": np.array([0, 0, 1, 1], np.int32)},
        {"vectors": np.full((4, WIDTH), np.nan, np.float32)},
        {"vectors": np.zeros((4, WIDTH))},
        {"base_whitening": np.zeros((WIDTH, 2), np.float32)},
        {"base_threshold": np.zeros(2)},
        {"base_threshold": np.array(np.nan)},
        {"base_whitening": np.full((WIDTH, WIDTH), 1e308)},
        {"base_whitening": np.ones((WIDTH, WIDTH), np.bool_)},
        {"base_whitening": np.array(1, np.float32)},
        {"vectors": np.zeros((4, 7), np.float32)},
    ],
)
def test_a_damaged_bank_is_refused(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    bank = taught(world, 2, "ab")
    bank.save(tmp_path / "x.bank")
    damaged(tmp_path / "x.bank", **changes)
    encoder: Any = Encoder()
    with pytest.raises(InputError, match=r"x\.bank is no bank, or a damaged one"):
        PrototypeBank.load(tmp_path / "x.bank", on=encoder)


@pytest.mark.parametrize("labels", ["", "ab"])
def test_a_bank_of_another_width_is_refused(labels: str, world: World, tmp_path: Path) -> None:
    bank = taught(world, 2, labels)
    bank.save(tmp_path / "x.bank")
    encoder: Any = Encoder()
    loaded = PrototypeBank.load(tmp_path / "x.bank", on=encoder)
    assert loaded.counts == bank.counts
    with pytest.raises(InputError, match=f"vectors of {WIDTH} numbers, but 'embedding' .* has 7"):
        loaded.add("new", world.rows("new", 2)[:, :7])


def test_a_bank_is_taught_while_it_answers(world: World) -> None:
    bank = taught(world, 3, "ab")
    features = bank._on.extract(world.rows("a", 4))  # type: ignore[arg-type]
    failures: list[BaseException] = []
    started = threading.Barrier(2)

    def ask() -> None:
        started.wait()
        try:
            for _ in range(50):
                assert len(bank(features)) == 4
        except BaseException as error:  # noqa: BLE001, shown below
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    started.wait()
    for at in range(10):
        bank.add(f"new {at}", world.rows(f"new {at}", 2))
    thread.join()
    assert failures == []


@pytest.fixture(scope="module")
def clip(tapped_bundle: Path) -> Iterator[DualEncoder]:
    with DualEncoder.load(tapped_bundle, precision="fp32") as model:
        yield model


def test_a_bank_shares_the_run_of_an_encoder(clip: DualEncoder, tiny_bundle: Bundle) -> None:
    rng = np.random.default_rng(2)
    dark = rng.integers(0, 60, (4, 20, 20, 3), dtype=np.uint8)
    light = rng.integers(190, 256, (4, 20, 20, 3), dtype=np.uint8)
    for tap in ("embedding", "patches"):
        bank = mmedge.PrototypeBank.create("light", on=clip, tap=tap)
        bank.add("dark", dark[:3])
        bank.add("light", clip.extract(light[:3]))
        features = clip.extract(np.stack([dark[3], light[3]]))
        assert [answer.nearest for answer in bank(features)] == ["dark", "light"]
    with (
        DualEncoder.load(tiny_bundle.path) as other,
        pytest.raises(SpaceMismatchError, match="reads 'patches' of clip-"),
    ):
        bank(other.extract(dark[0]))
    with pytest.raises(SpaceMismatchError, match="text features"):
        bank(clip.extract_text("a"))


def test_a_folder_is_taught_from_the_command_line(
    tapped_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmedge import cli

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main([str(each) for each in arguments])
        made = capsys.readouterr()
        assert done.value.code == code, made.err
        return " ".join((made.out if code == 0 else made.err).split())

    folder, out = tmp_path / "mugs", tmp_path / "mugs.bank"
    asked = ("heads", "teach", tapped_bundle, folder, "-o", out)
    assert "expected a folder with a folder of images" in run(*asked, code=1)
    for at, label in enumerate(("my mug", "your mug")):
        write_images(folder / label, 4, at)
    text = run(*asked)
    assert "mugs.bank written: my mug (4), your mug (4)." in text
    assert "Leave-one-out accuracy: " in text
    assert "8 frames" in text
    assert "mugs.bank exists. Pass --overwrite" in run(*asked, code=1)
    document = json.loads(run(*asked, "--overwrite", "--tap", "patches", "--json"))
    assert document["labels"] == {"my mug": 4, "your mug": 4}
    assert document["tap"] == "patches"
    assert {each["label"] for each in document["outliers"]} <= {"my mug", "your mug"}
    few = tmp_path / "few"
    for at, label in enumerate(("mine", "yours")):
        write_images(few / label, 1, at)
    text = run("heads", "teach", tapped_bundle, few, "-o", tmp_path / "few.bank")
    assert "Leave-one-out accuracy: needs two labels and several images of one." in text
    (folder / "loose.png").write_bytes(b"")
    assert "loose.png has no label. Move it" in run(*asked, "--overwrite", code=1)
    (folder / "loose.png").unlink()
    (folder / "empty").mkdir()
    assert "empty holds no images" in run(*asked, "--overwrite", code=1)
