"""Described machines: a few files and command outputs each, written by hand.

Files and command outputs follow the documentation of such a machine; none was
copied from a real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.machine.host import Host, PythonFacts

GIB = 1 << 30
CPU_PROVIDERS = {"offers": ["CPU"]}
CUDA_PROVIDERS = {"offers": ["CUDA", "CPU"]}


CLOSED = PythonFacts("3.12.3", "/home/user/.venv/bin/python", virtual=True, sees_system=False)
OPEN = PythonFacts("3.10.12", "/home/user/.venv/bin/python", virtual=True, sees_system=True)


@dataclass(frozen=True)
class Described:
    """A machine in words.

    Attributes:
        files: Text of its files, by path from the root.
        commands: What its commands print, by their first words.
        engines: Versions of installed engines, by backend.
        probes: What engines say of themselves.
        packages: Versions of installed distributions.
        architecture: As `uname -m` prints it.
        processors: How many this process may use.
        environment: Environment variables.
        python: The Python that runs mmedge.
    """

    files: Mapping[str, str]
    commands: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)
    probes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "x86_64"
    processors: int = 4
    environment: Mapping[str, str] = field(default_factory=dict)
    python: PythonFacts = CLOSED

    def host(self, root: Path) -> Host:
        """Lay its files under a folder and return the machine."""
        for name, text in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

        def run(command: Sequence[str]) -> str | None:
            line = " ".join(command)
            known = [start for start in self.commands if line.startswith(start)]
            return self.commands[max(known, key=len)] if known else None

        return Host(
            root=root,
            run=run,
            probe=lambda name: self.probes.get(name, {}),
            engine_version=self.engines.get,
            package=(dict(self.packages) | {"mmedge": "0.1.0"}).get,
            free_bytes=lambda _: 100 * 10**9,
            architecture=self.architecture,
            processors=tuple(range(self.processors)),
            environment=self.environment,
            python=self.python,
        )


def cpuinfo(count: int, **fields: str) -> str:
    """A /proc/cpuinfo of equal processors."""
    lines = [f"{name.replace('_', ' ')}\t: {value}" for name, value in fields.items()]
    return "\n\n".join(f"processor\t: {i}\n" + "\n".join(lines) for i in range(count)) + "\n"


def meminfo(total_gib: float, free_gib: float) -> str:
    return (
        f"MemTotal:       {int(total_gib * GIB) // 1024} kB\n"
        f"MemFree:        1024 kB\nMemAvailable:   {int(free_gib * GIB) // 1024} kB\n"
    )


def deb(**packages: str) -> str:
    """A dpkg status file of installed packages; _ means -."""
    return "\n\n".join(
        f"Package: {name.replace('_', '-')}\nStatus: install ok installed\nVersion: {version}"
        for name, version in packages.items()
    )


def nvidia_smi(name: str, capability: str, mib: int, driver: str, cuda: str) -> dict[str, str]:
    """What nvidia-smi prints of one GPU."""
    return {
        "nvidia-smi": f"| Driver Version: {driver}   CUDA Version: {cuda} |\n",
        "nvidia-smi -L": f"GPU 0: {name}\n",
        "nvidia-smi --query-gpu": f"0, {name}, {capability}, {mib}, {mib - 512}\n",
    }


ARM_FLAGS = "fp asimd evtstrm aes asimdhp asimdrdm asimddp"
ORIN = Described(
    files={
        "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, ...\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
        "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
        "proc/cpuinfo": cpuinfo(12, Features=ARM_FLAGS, CPU_implementer="0x41", CPU_part="0xd42"),
        "proc/meminfo": meminfo(61.4, 50),
        "usr/local/cuda/version.json": '{"cuda" : {"name" : "CUDA SDK", "version" : "12.6.11"}}',
        "var/lib/dpkg/status": deb(
            nvidia_jetpack="6.2+b77", libnvinfer10="10.3.0.30-1+cuda12.5", bash="5.1-6"
        ),
        "sys/class/hwmon/hwmon3/name": "ina3221\n",
        **{
            f"sys/class/hwmon/hwmon3/{file}": text
            for n, label in enumerate(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 1)
            for file, text in (
                (f"in{n}_label", label),
                (f"in{n}_input", "5000"),
                (f"curr{n}_input", "800"),
            )
        },
    },
    commands={
        "nvpmodel -q": "NV Power Mode: MODE_30W\n2\n",
        "nvidia-smi --query-gpu": "0, Orin (nvgpu), [N/A], [Not Supported], [Not Supported]\n",
    },
    engines={"onnxruntime": "onnxruntime 1.23.2", "tensorrt": "10.3.0"},
    probes={
        "onnxruntime": CPU_PROVIDERS,
        "tensorrt": {"offers": []},
        "cuda": {
            "driver": "12.6",
            "runtime": "12.6",
            "devices": [
                {
                    "index": 0,
                    "name": "Orin",
                    "compute_capability": "8.7",
                    "memory_bytes": 64 * GIB,
                    "free_bytes": 50 * GIB,
                    "integrated": True,
                }
            ],
        },
    },
    packages={"onnxruntime": "1.23.2", "cuda-bindings": "12.6.2"},
    architecture="aarch64",
    processors=12,
    python=OPEN,
)
"""A Jetson AGX Orin with JetPack 6.2, all installed that TensorRT needs."""

THOR = Described(
    files={
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
        "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 2, BOARD: generic, ...\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0",
        "proc/sys/kernel/osrelease": "6.8.12-tegra\n",
        "proc/cpuinfo": cpuinfo(
            14, Features=f"{ARM_FLAGS} sve i8mm bf16 sve2", CPU_implementer="0x41", CPU_part="0xd83"
        ),
        "proc/meminfo": meminfo(122.8, 110),
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  "
        "580.00  Release Build\n",
        "usr/local/cuda/version.json": '{"cuda" : {"name" : "CUDA SDK", "version" : "13.0.0"}}',
        "var/lib/dpkg/status": deb(libnvinfer10="10.13.3.9-1+cuda13.0"),
        "var/lib/nvpmodel/status": "pmode:0001",
    },
    engines={"onnxruntime": "onnxruntime 1.23.2"},
    probes={"onnxruntime": CPU_PROVIDERS},
    packages={"onnxruntime": "1.23.2"},
    architecture="aarch64",
    processors=14,
)
"""A Jetson AGX Thor with JetPack 7.0 as it is unpacked: mmedge in a closed virtual environment."""

DESKTOP = Described(
    files={
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.2 LTS"\n',
        "proc/cpuinfo": cpuinfo(
            16, model_name="Example Core 16-Core Processor", flags="avx2 avx512f avx512_vnni"
        ),
        "proc/meminfo": meminfo(62, 40),
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  "
        "Sun Jan  1 00:00:00 UTC 2026\n",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    },
    commands=nvidia_smi("NVIDIA GeForce RTX 4070", "8.9", 12282, "580.65.06", "13.0"),
    engines={"onnxruntime": "onnxruntime-gpu 1.23.2", "tensorrt-rtx": "1.7.1.116"},
    probes={
        "onnxruntime": CUDA_PROVIDERS,
        "tensorrt-rtx": {"offers": ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]},
        "cuda": {"driver": "13.0", "runtime": "13.0", "devices": []},
    },
    packages={"onnxruntime-gpu": "1.23.2", "cuda-bindings": "13.0.1"},
    processors=16,
)
"""A desktop with a GeForce, TensorRT-RTX installed."""

SERVER = Described(
    files={
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "proc/cpuinfo": cpuinfo(
            32, model_name="Example Server CPU", flags="avx2 avx512f avx512_vnni amx_int8 amx_bf16"
        ),
        "proc/meminfo": meminfo(503, 480),
        "sys/fs/cgroup/memory.max": f"{64 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{4 * GIB}\n",
        ".dockerenv": "",
    },
    commands=nvidia_smi("NVIDIA H100 80GB HBM3", "9.0", 81559, "550.54.15", "12.4"),
    engines={"onnxruntime": "onnxruntime 1.23.2"},
    probes={"onnxruntime": CPU_PROVIDERS},
    packages={"onnxruntime": "1.23.2"},
    processors=8,
)
"""A container on a server with an H100 and a driver of CUDA 12; nothing of CUDA for Python."""

BARE = Described(
    files={"proc/cpuinfo": cpuinfo(4, model_name="Example CPU", flags="sse4_2 avx2")},
    engines={"onnxruntime": "onnxruntime 1.23.2"},
    probes={"onnxruntime": CPU_PROVIDERS},
    packages={"onnxruntime": "1.23.2"},
)
"""A computer without anything, and an almost empty file system."""

MACHINES: dict[str, Described] = {
    "orin": ORIN,
    "thor": THOR,
    "desktop": DESKTOP,
    "server": SERVER,
    "bare": BARE,
}
