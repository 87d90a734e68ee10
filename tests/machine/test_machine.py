"""What a machine has, read from machines that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from machines import BARE, CPU_PROVIDERS, DESKTOP, GIB, MACHINES, ORIN, SERVER, THOR, Described

from mmedge.machine import host as host_module
from mmedge.machine.gpus import Cuda, Gpu
from mmedge.machine.host import Host, PythonFacts
from mmedge.machine.jetson import Jetson, installed_deb
from mmedge.machine.report import Machine, look_at_machine
from mmedge.runtimes.backends import BACKENDS


def look(described: Described, tmp_path: Path) -> Machine:
    return look_at_machine(described.host(tmp_path / "root"))


def with_files(described: Described, **files: str) -> Described:
    named = {path.replace("__", "/"): text for path, text in files.items()}
    return replace(described, files=dict(described.files) | named)


def test_an_orin_with_jetpack_6(tmp_path: Path) -> None:
    machine = look(ORIN, tmp_path)
    assert machine.jetson == Jetson(
        model="NVIDIA Jetson AGX Orin Developer Kit",
        family="Orin",
        compute_capability="8.7",
        l4t="36.4.3",
        jetpack="6.2",
        power_mode="30W",
    )
    assert machine.gpus == (Gpu("Orin", "8.7", 64 * GIB, 50 * GIB, integrated=True),)
    assert machine.cuda == Cuda("", "12.6", "12.6.11", "12.6.2", "")
    assert machine.system == "Ubuntu 22.04.5 LTS, Linux 5.15.148-tegra"
    assert machine.processor.name == "Cortex-A78AE"
    assert (machine.processor.online, machine.processor.allowed) == (12, 12)
    assert machine.processor.features == ("NEON", "fp16", "dot product")
    assert machine.engine("tensorrt").usable
    assert machine.energy.startswith("INA3221: VDD_GPU_SOC")
    assert machine.notes == ()


def test_a_thor_with_jetpack_7_out_of_the_box(tmp_path: Path) -> None:
    machine = look(THOR, tmp_path)
    assert machine.jetson is not None
    assert (machine.jetson.l4t, machine.jetson.jetpack) == ("38.2.0", "7.0")
    assert machine.jetson.power_mode == "number 1"
    assert machine.gpus == (Gpu("Thor (integrated)", "11.0", integrated=True),)
    assert machine.cuda == Cuda("580.00", "", "13.0.0", "", "")
    assert machine.processor.name == "Neoverse-V3AE"
    assert "int8 matrices" in machine.processor.features
    tensorrt = machine.engine("tensorrt")
    assert (tensorrt.version, tensorrt.elsewhere) == (None, "10.13.3.9")
    assert not tensorrt.usable


def test_a_desktop_with_an_rtx_card(tmp_path: Path) -> None:
    machine = look(DESKTOP, tmp_path)
    assert machine.jetson is None
    assert machine.gpus == (
        Gpu("NVIDIA GeForce RTX 4070", "8.9", 12282 << 20, (12282 - 512) << 20),
    )
    assert machine.cuda == Cuda("580.65.06", "13.0", "", "13.0.1", "")
    assert machine.processor.features == ("AVX2", "AVX-512", "AVX-512 VNNI")
    assert machine.engine("onnxruntime").builds == ("onnxruntime-gpu",)
    assert machine.engine("onnxruntime").offers[0] == "CUDA"
    assert machine.engine("tensorrt-rtx").offers[-1] == "12.1"
    assert machine.notes == ()


def test_a_container_on_a_server(tmp_path: Path) -> None:
    machine = look(SERVER, tmp_path)
    assert machine.container
    assert (machine.memory_bytes, machine.free_bytes) == (64 * GIB, 60 * GIB)
    assert (machine.processor.online, machine.processor.allowed) == (32, 8)
    assert machine.gpus[0].compute_capability == "9.0"
    assert machine.cuda == Cuda("550.54.15", "12.4", "", "", "")


def test_a_computer_without_anything(tmp_path: Path) -> None:
    machine = look(BARE, tmp_path)
    assert (machine.gpus, machine.jetson) == ((), None)
    assert machine.cuda == Cuda("", "", "", "", "")
    assert machine.system == "unknown"
    assert (machine.memory_bytes, machine.free_bytes) == (None, None)
    assert machine.energy == ""
    assert "RAPL" in machine.energy_missing
    assert [engine.name for engine in machine.engines] == list(BACKENDS)
    assert [engine.version for engine in machine.engines[1:]] == [None, None, None]


def test_nothing_at_all_is_no_error(tmp_path: Path) -> None:
    machine = look(Described(files={}, processors=1), tmp_path)
    assert machine.processor.online == 1
    assert machine.engine("onnxruntime").version is None


@pytest.mark.parametrize("name", MACHINES)
def test_garbage_in_every_file_is_no_error(tmp_path: Path, name: str) -> None:
    described = MACHINES[name]
    garbage = dict.fromkeys(described.files, "�: : {{{ R (release), \n\x00 MemTotal: x kB")
    commands = dict.fromkeys(described.commands, "a, b\n\n,,,,,\nCUDA Version: x")
    probes: dict[str, dict[str, object]] = {name: {"devices": 3} for name in described.probes}
    broken = replace(described, files=garbage, commands=commands, probes=probes)
    assert look(broken, tmp_path).engines


@pytest.mark.parametrize(
    ("release", "status", "expected"),
    [
        ("# R36 (release), REVISION: 4.4, GCID", "", ("36.4.4", "6.2.1")),
        ("# R36 (release), REVISION: 3.0, GCID", "", ("36.3.0", "6.0")),
        ("# R38 (release), REVISION: 4, GCID", "", ("38.4.0", "7.1")),
        ("# R36 (release), REVISION: 9.9, GCID", "", ("36.9.9", "6.x")),
        ("# R36 (release), REVISION: 9.9, GCID", "nvidia-jetpack 6.9+b1", ("36.9.9", "6.9")),
        ("# R99 (release), REVISION: 1.0, GCID", "", ("99.1.0", "")),
        ("", "nvidia-l4t-core 36.4.3-20250107174145", ("36.4.3", "6.2")),
        ("", "", ("", "")),
    ],
)
def test_releases(tmp_path: Path, release: str, status: str, expected: tuple[str, str]) -> None:
    name, _, version = status.partition(" ")
    package = f"Package: {name}\nStatus: install ok installed\nVersion: {version}\n"
    described = with_files(ORIN, etc__nv_tegra_release=release, var__lib__dpkg__status=package)
    jetson = look(described, tmp_path).jetson
    assert jetson is not None
    assert (jetson.l4t, jetson.jetpack) == expected


def test_a_package_that_was_removed_is_not_installed(tmp_path: Path) -> None:
    text = "Package: libnvinfer10\nStatus: deinstall ok config-files\nVersion: 10.3.0-1\n"
    host = with_files(BARE, var__lib__dpkg__status=text).host(tmp_path)
    assert installed_deb(host, "libnvinfer10") == ""


def test_a_driver_without_nvidia_smi_still_names_its_gpus(tmp_path: Path) -> None:
    files = {
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX A2000\nIRQ: 1\n"
    }
    described = replace(DESKTOP, files=dict(DESKTOP.files) | files, commands={})
    machine = look(described, tmp_path)
    assert machine.gpus == (Gpu("NVIDIA RTX A2000", ""),)
    assert machine.cuda.driver == "580.65.06"


def test_cuda_reports_more_than_nvidia_smi(tmp_path: Path) -> None:
    device = {"index": 0, "name": "A", "compute_capability": "8.6", "memory_bytes": 8 * GIB}
    probes = dict(DESKTOP.probes) | {"cuda": {"driver": "12.8", "devices": [device]}}
    machine = look(replace(DESKTOP, probes=probes), tmp_path)
    assert machine.gpus == (Gpu("A", "8.6", 8 * GIB, None),)
    assert machine.cuda.serves == "12.8"


def test_cuda_is_not_queried_without_a_driver(tmp_path: Path) -> None:
    described = replace(
        BARE,
        packages={"cuda-bindings": "13.0.1"},
        probes=dict(BARE.probes) | {"cuda": {"fault": "asked"}},
    )
    assert look(described, tmp_path).cuda.fault == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commands": {}, "files": dict(DESKTOP.files)}, "Install NVIDIA's driver"),
        ({"commands": {}, "files": dict(DESKTOP.files) | {".dockerenv": ""}}, "--gpus all"),
        ({"commands": {}, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides every GPU"),
        (
            {"packages": {"onnxruntime": "1.23", "onnxruntime-gpu": "1.23"}},
            "are both installed, as the same module: onnxruntime-gpu 1.23.2",
        ),
        (
            {"probes": {"onnxruntime": {"fault": "libcudart.so.13 is missing"}}},
            "onnxruntime is installed and does not start: libcudart.so.13 is missing",
        ),
        ({"probes": {"cuda": {"fault": "the driver is too old"}}}, "driver is too old"),
    ],
)
def test_oddities_are_reported_with_a_fix(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    described = replace(DESKTOP, **change)  # type: ignore[arg-type]
    if "commands" in change:
        files = {k: v for k, v in described.files.items() if "driver" not in k}
        described = replace(described, files=files)
    assert any(message in note for note in look(described, tmp_path).notes)


def test_this_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real commands, files and processes; what they say is the machine's own business."""
    machine = look_at_machine()
    engine = machine.engine("onnxruntime")
    assert engine.usable
    assert engine.version == f"onnxruntime {version('onnxruntime')}"
    assert Path(engine.module).parent.name == "onnxruntime"
    assert "CPU" in engine.offers
    assert machine.memory_bytes is None or machine.memory_bytes > 1 << 20
    assert machine.processor.allowed == len(os.sched_getaffinity(0))
    assert machine.python.executable == sys.executable


def test_an_engine_that_crashes_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fault" in Host().probe("no such engine")
    monkeypatch.setattr(host_module, "_PROBE_S", 0.001)
    assert "did not finish" in str(Host().probe("onnxruntime")["fault"])


def test_a_command_that_fails_hangs_or_is_missing_has_no_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Host().run
    assert run(["echo", "a"]) == "a\n"
    assert run(["false"]) is None
    assert run(["no-such-command"]) is None
    monkeypatch.setattr(host_module, "_COMMAND_S", 0.05)
    assert run(["sleep", "5"]) is None


def test_free_space_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    free = Host().free_bytes(tmp_path / "a" / "b")
    assert free is not None
    assert free > 0


def test_python_of_this_process() -> None:
    facts = PythonFacts.of_this_process()
    assert facts.virtual == (sys.prefix != sys.base_prefix)
    assert facts.version.count(".") == 2


def test_asking_loads_no_engine_here() -> None:
    code = (
        "import sys; from mmedge.machine.report import look_at_machine; look_at_machine()\n"
        "engines = {'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx_bindings'}\n"
        "assert not engines & set(sys.modules), engines & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_jetson_s_nvidia_smi_is_not_believed(tmp_path: Path) -> None:
    """It knows neither compute capability nor memory, and the device tree knows the chip."""
    described = replace(ORIN, packages={}, probes={"onnxruntime": CPU_PROVIDERS})
    assert look(described, tmp_path).gpus == (Gpu("Orin (integrated)", "8.7", integrated=True),)
