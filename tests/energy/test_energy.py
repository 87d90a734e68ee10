"""Energy counters, read from a sysfs that the tests write; nothing is asked of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmedge.energy import counter as energy
from mmedge.energy import ina3221, rapl
from mmedge.energy.counter import (
    EnergyCounter,
    energy_counter,
    energy_per_call_mj,
    unavailable_reason,
)
from mmedge.errors import InputError, ProfileError

RANGE_UJ = 262_143_328_850


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content}\n")
    return file


def add_zone(
    sys: Path, zone: str, name: str, energy_uj: object = 1000, range_uj: int = RANGE_UJ
) -> Path:
    """A powercap zone; returns its counter's file."""
    folder = sys / "class/powercap" / zone
    write(folder / "name", name)
    write(folder / "max_energy_range_uj", range_uj)
    return write(folder / "energy_uj", energy_uj)


def add_chip(sys: Path, index: int, name: str, rails: dict[str, tuple[int, int]]) -> Path:
    """A hwmon chip with voltage (mV) and current (mA) by label; returns its folder."""
    chip = sys / "class/hwmon" / f"hwmon{index}"
    write(chip / "name", name)
    for number, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        write(chip / f"in{number}_label", label)
        write(chip / f"in{number}_input", millivolts)
        write(chip / f"curr{number}_input", milliamperes)
    write(chip / "in7_label", "sum of shunt voltages")
    write(chip / "in7_input", 40)
    return chip


def counter_of(sys: Path) -> EnergyCounter:
    counter = energy_counter(sys)
    assert counter is not None
    assert not unavailable_reason(sys)
    return counter


def spend(file: Path, microjoules: int) -> None:
    write(file, int(file.read_text()) + microjoules)


def test_rapl_adds_packages_and_their_memory_and_nothing_twice(tmp_path: Path) -> None:
    packages = [add_zone(tmp_path, f"intel-rapl:{i}", f"package-{i}") for i in (0, 1)]
    memory = add_zone(tmp_path, "intel-rapl:0:1", "dram")
    contained = [
        add_zone(tmp_path, "intel-rapl:0:0", "core"),
        add_zone(tmp_path, "intel-rapl:0:2", "uncore"),
        add_zone(tmp_path, "intel-rapl:2", "psys"),
        add_zone(tmp_path, "intel-rapl-mmio:0", "package-0"),
    ]
    (tmp_path / "class/powercap/intel-rapl").mkdir()
    counter = counter_of(tmp_path)
    with counter.measure() as measured:
        for file, energy_uj in zip((*packages, memory), (5_000_000, 300_000, 20_500), strict=True):
            spend(file, energy_uj)
        for file in contained:
            spend(file, 1_000_000)
    assert measured.energy_mj == pytest.approx(5320.5)
    assert counter.what == "RAPL: package-0, dram, package-1"


def test_rapl_turns_over(tmp_path: Path) -> None:
    file = add_zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=RANGE_UJ - 400)
    with counter_of(tmp_path).measure() as measured:
        write(file, 599)  # 400 up to the largest value, 1 to zero
    assert measured.energy_mj == pytest.approx(1.0)


def test_rapl_is_read_often_enough_to_see_every_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rapl, "_INTERVAL_S", 1e-4)
    file = add_zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=0, range_uj=999)
    seen: list[int] = []
    read = rapl.Domain.read_uj

    def read_and_spend(domain: rapl.Domain) -> int:
        # Every reading finds 600 more on a counter that turns over at 1000.
        value = read(domain)
        seen.append(value)
        file.write_text(str((value + 600) % 1000))
        return value

    counter = counter_of(tmp_path)
    monkeypatch.setattr(rapl.Domain, "read_uj", read_and_spend)
    with counter.measure() as measured:
        wait_for(lambda: len(seen) >= 5)
    assert measured.energy_mj == pytest.approx(0.6 * (len(seen) - 1))


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("nothing happened for ten seconds")


@pytest.mark.parametrize(
    ("rails", "watts", "what"),
    [
        ({"VDD_IN": (5000, 2000), "VDD_CPU_GPU_CV": (5000, 800), "VDD_SOC": (5000, 300)}, 10.0, 1),
        (
            {"VDD_GPU_SOC": (20000, 500), "VDD_CPU_CV": (20000, 100), "VIN_SYS_5V0": (5000, 600)},
            15.0,
            3,
        ),
    ],
)
def test_ina3221_sums_power_over_time_for_the_rails_that_make_the_module(
    tmp_path: Path, rails: dict[str, tuple[int, int]], watts: float, what: int
) -> None:
    add_chip(tmp_path, 0, "cpu_thermal", {"VDD_IN": (9000, 9000)})
    add_chip(tmp_path, 1, "ina3221", rails)
    add_chip(tmp_path, 2, "ina3221", {"VDDQ_VDD2_1V8AO": (5000, 400)})
    found = ina3221.find_rails(tmp_path)
    assert found is not None
    assert len(found.rails) == what
    moments_ns = iter([0, 20_000_000, 50_000_000])
    tick = ina3221.Rails(found.rails, clock=lambda: next(moments_ns)).start()
    assert tick() == pytest.approx(watts * 20)
    assert tick() == pytest.approx(watts * 30)


def test_ina3221_takes_the_mean_of_two_readings_for_the_time_between(tmp_path: Path) -> None:
    chip = add_chip(tmp_path, 0, "ina3221", {"VDD_IN": (5000, 1000)})
    found = ina3221.find_rails(tmp_path)
    assert found is not None
    moments_ns = iter([0, 1_000_000_000])
    tick = ina3221.Rails(found.rails, clock=lambda: next(moments_ns)).start()
    write(chip / "curr1_input", 3000)
    assert tick() == pytest.approx((5000 + 15000) / 2)


def test_ina3221_samples_while_the_work_runs(tmp_path: Path) -> None:
    chip = add_chip(tmp_path, 0, "ina3221", {"VDD_IN": (5000, 1)})
    counter = counter_of(tmp_path)
    assert counter.what == "INA3221: VDD_IN"
    with counter.measure() as measured:
        # The peak lies between two idle ends: without samples in the middle it is not seen.
        replaced = chip / "next"
        write(replaced, 100_000).replace(chip / "curr1_input")
        started = time.monotonic()
        wait_for(lambda: time.monotonic() - started > 0.1)
        write(replaced, 1).replace(chip / "curr1_input")
    assert measured.energy_mj > 5000.0  # 500 W over a tenth of a second make 50 J


def test_a_counter_that_goes_away_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = add_zone(tmp_path, "intel-rapl:0", "package-0")
    counter = counter_of(tmp_path)
    gone = pytest.raises(ProfileError, match=r"intel-rapl:0.energy_uj: cannot be read any more")
    with gone, counter.measure():
        file.unlink()


def test_a_sample_that_fails_on_the_way_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ina3221, "_INTERVAL_S", 1e-4)
    chip = add_chip(tmp_path, 0, "ina3221", {"VDD_IN": (5000, 1000)})
    counter = counter_of(tmp_path)
    gone = pytest.raises(ProfileError, match="'VDD_IN'")
    with gone, counter.measure():
        (chip / "curr1_input").rename(chip / "gone")
        wait_for(lambda: not any_energy_thread())
        (chip / "gone").rename(chip / "curr1_input")


def any_energy_thread() -> bool:
    return any(thread.name == "mmedge-energy" for thread in energy.threading.enumerate())


def test_an_error_of_the_work_is_let_through_and_the_thread_ends(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    with pytest.raises(ZeroDivisionError), counter_of(tmp_path).measure() as measured:
        1 / 0  # noqa: B018
    assert not any_energy_thread()
    with pytest.raises(ProfileError, match="after the 'with' block"):
        _ = measured.energy_mj


def test_energy_is_not_known_before_the_end(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    early = pytest.raises(ProfileError, match="after the 'with' block")
    with counter_of(tmp_path).measure() as measured, early:
        _ = measured.energy_mj
    assert measured.energy_mj == 0


def test_reason_without_a_counter(tmp_path: Path) -> None:
    assert energy_counter(tmp_path) is None
    reason = unavailable_reason(tmp_path)
    assert reason.startswith("No energy counter can be read here. RAPL: ")
    assert "virtual machines" in reason
    assert "class/hwmon shows none" in reason
    assert reason.endswith("choose by latency or size, which need no counter.")


def test_reason_if_only_root_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = add_zone(tmp_path, "intel-rapl:0", "package-0")
    read_text = Path.read_text

    def refuse(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        # chmod would not stop a root that runs the tests.
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert energy_counter(tmp_path) is None
    reason = unavailable_reason(tmp_path)
    assert f"{file} is readable by root only. Run as root, or allow it" in reason
    assert "sudo chmod a+r" in reason


@pytest.mark.parametrize("content", ["", "many"])
def test_reason_if_the_counter_is_no_number(tmp_path: Path, content: str) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=content)
    assert energy_counter(tmp_path) is None
    assert "is no number" in unavailable_reason(tmp_path)


def test_reason_if_rails_are_unknown_or_unreadable(tmp_path: Path) -> None:
    chip = add_chip(tmp_path, 0, "ina3221", {"MAIN": (5000, 100), "FAN": (5000, 10)})
    assert energy_counter(tmp_path) is None
    assert "got the rails MAIN, FAN, of which it is not known" in unavailable_reason(tmp_path)
    write(chip / "in1_label", "VDD_IN")
    (chip / "curr1_input").unlink()
    assert energy_counter(tmp_path) is None
    assert "VDD_IN, FAN are there but cannot be read" in unavailable_reason(tmp_path)


class Machine:
    """Time and energy that pass when calls are made."""

    def __init__(self, sys: Path) -> None:
        self.file = add_zone(sys, "intel-rapl:0", "package-0", energy_uj=0)
        self.now_ns = 0
        self.order: list[str] = []

    def call(self, name: str, milliseconds: float, *microjoules: int) -> Callable[[], None]:
        """A call that takes so long and so much, block for block."""

        def run() -> None:
            if not self.order or self.order[-1] != name:
                self.order.append(name)
            block = self.order.count(name) - 1
            self.now_ns += round(milliseconds * 1e6)
            spend(self.file, microjoules[min(block, len(microjoules) - 1)])

        return run


def test_energy_of_a_call_in_turns(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    # The third block of "int8" had company; the median does not mind.
    calls = {
        "fp32": machine.call("fp32", 100, 8000),
        "int8": machine.call("int8", 30, 2000, 2000, 90_000),
    }
    found = energy_per_call_mj(calls, counter_of(tmp_path), seconds=2, clock=lambda: machine.now_ns)
    assert list(found) == ["fp32", "int8"]
    assert found["fp32"] == pytest.approx(8.0)
    assert found["int8"] == pytest.approx(2.0)
    # There and back again: neighbours of two rounds are one stretch in what was seen.
    assert machine.order == ["fp32", "int8", "fp32", "int8", "fp32"]


def test_energy_of_a_call_longer_than_a_block(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    found = energy_per_call_mj(
        {"slow": machine.call("slow", 2000, 7000)},
        counter_of(tmp_path),
        seconds=0.5,
        clock=lambda: machine.now_ns,
    )
    assert found == {"slow": pytest.approx(7.0)}
    assert machine.now_ns == 4_000_000_000  # one that does not count, one that does


def test_a_stopped_counter_is_an_error(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with pytest.raises(ProfileError, match=r"Energy of 'idle': RAPL: package-0 measured 0 mJ"):
        energy_per_call_mj(
            {"idle": machine.call("idle", 100, 0)},
            counter_of(tmp_path),
            seconds=1,
            clock=lambda: machine.now_ns,
        )


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_nothing_to_measure_is_refused(tmp_path: Path, seconds: float) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    with pytest.raises(InputError, match="expected at least 1 call and more than 0 seconds"):
        energy_per_call_mj({}, counter_of(tmp_path), seconds=1)
    with pytest.raises(InputError, match="expected at least 1 call and more than 0 seconds"):
        energy_per_call_mj({"a": int}, counter_of(tmp_path), seconds=seconds)
