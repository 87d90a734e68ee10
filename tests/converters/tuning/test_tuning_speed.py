"""Who takes part in a timing, and what a figure is of; no time is asserted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from crashes import crash_on
from towers import image_tower, images

from mmedge.converters.graphs.worker import Worker
from mmedge.converters.tuning import speed as module
from mmedge.converters.tuning.speed import Runner, SpeedTest, installed_backends
from mmedge.energy.counter import EnergyCounter
from mmedge.errors import BackendError
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.selection.interleaved import InterleavedTiming
from mmedge.specs import Array

FEED, GOLDEN = images(1), images(4, seed=8)


def output(model: Path) -> Array:
    with open_session(model) as session:
        return session.run(GOLDEN)["embeds"]


def runner(model: Path, golden: Array | None = None) -> Runner:
    known = output(model) if golden is None else golden
    return Runner({"portable": model}, {"embeds": known}, 0.999)


@pytest.fixture
def fp32(tmp_path: Path) -> Runner:
    return runner(image_tower(tmp_path / "fp32.onnx"))


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUNDS", 5)
    monkeypatch.setattr(module, "_ENERGY_SECONDS", 0.1)


def test_fp32_is_its_own_reference(fp32: Runner) -> None:
    found = SpeedTest(fp32, FEED, GOLDEN).fp32()
    assert found.backend == "onnxruntime"
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (1, 1, 1)
    assert found.energy_mj is None


def test_a_candidate_is_compared_with_fp32(fp32: Runner, tmp_path: Path) -> None:
    test = SpeedTest(fp32, FEED, GOLDEN)
    found = test.candidate(runner(image_tower(tmp_path / "other.onnx", seed=3)))
    assert found is not None
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.latency_ms > 0


def test_a_candidate_with_other_outputs_is_not_timed(fp32: Runner, tmp_path: Path) -> None:
    test = SpeedTest(fp32, FEED, GOLDEN)
    other = image_tower(tmp_path / "other.onnx", seed=3)
    assert test.candidate(runner(other, fp32.golden["embeds"])) is None
    assert test.candidate(runner(other, np.full_like(fp32.golden["embeds"], np.nan))) is None


def test_a_candidate_that_no_engine_opens_is_not_timed(fp32: Runner, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    test = SpeedTest(fp32, FEED, GOLDEN)
    assert test.candidate(Runner({"portable": broken}, fp32.golden, 0.999)) is None
    assert test.candidate(Runner({}, fp32.golden, 0.999)) is None


def test_fp32_with_other_outputs_is_an_error(fp32: Runner) -> None:
    spoiled = Runner(fp32.models, {"embeds": -fp32.golden["embeds"]}, 0.999)
    with pytest.raises(BackendError, match="fp32"):
        SpeedTest(spoiled, FEED, GOLDEN).fp32()


@pytest.mark.usefixtures("several_backends")
def test_every_engine_takes_part(fp32: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    opened: list[str] = []
    plain = Worker.open

    def noted(worker: Worker, model: Path, label: str, *, backend_name: str, spin: bool) -> object:
        assert spin  # as on a device
        opened.append(backend_name)
        return plain(worker, model, label, backend_name=backend_name, spin=spin)

    monkeypatch.setattr(Worker, "open", noted)
    found = SpeedTest(fp32, FEED, GOLDEN).fp32()
    assert set(opened) == set(installed_backends()) >= {"onnxruntime", "openvino"}
    assert found.backend in opened


@pytest.mark.usefixtures("several_backends")
def test_an_engine_that_crashes_on_a_candidate_does_not_time_it(
    fp32: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    crash_on("other.onnx", tmp_path, monkeypatch, backend_name="openvino")
    other = runner(image_tower(tmp_path / "other.onnx", seed=3))
    third = runner(image_tower(tmp_path / "third.onnx", seed=4))
    with Worker() as worker:
        # fp32 goes down with the process and is opened again.
        reference, timed = SpeedTest(fp32, FEED, GOLDEN, worker=worker).compare([other, third])
    assert reference.ratio.value == 1
    assert timed[0] is not None
    assert timed[0].backend == "onnxruntime"
    assert timed[1] is not None


def test_clear_differences_need_few_rounds(
    fp32: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ratio = 0.5

    def time(
        _: Worker, graphs: Mapping[str, object], feed: object, *, rounds: int, seconds: float
    ) -> dict[str, InterleavedTiming]:
        assert feed is FEED
        assert seconds > 0
        asked.append(rounds)
        return {
            name: InterleavedTiming(1.0, 1.0, ratio, ratio - 0.02, ratio + 0.02, (1.0,))
            for name in graphs
        }

    monkeypatch.setattr(Worker, "time", time)
    test = SpeedTest(fp32, FEED, GOLDEN, rounds=12, clear_rounds=4)
    test.fp32()
    assert asked == [4]
    other = runner(image_tower(tmp_path / "other.onnx", seed=3))
    test.candidate(other)
    assert asked == [4, 4]
    ratio = 0.91
    test.candidate(other)
    assert asked == [4, 4, 4, 12]


class Meter:
    """Counts seven millijoules a reading."""

    what = "RAPL: a stand-in"
    interval_s = 60.0

    def start(self) -> Callable[[], float]:
        return lambda: 7.0


def test_energy_is_measured_where_a_counter_is_given(fp32: Runner, tmp_path: Path) -> None:
    test = SpeedTest(fp32, FEED, GOLDEN, EnergyCounter(Meter()))
    known = test.fp32().energy_mj
    assert known is not None
    assert 0 < known <= 7
    found = test.candidate(runner(image_tower(tmp_path / "other.onnx", seed=3)))
    assert found is not None
    assert found.energy_mj is not None
