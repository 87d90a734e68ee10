"""NVIDIA GPUs, driver and CUDA: from nvidia-smi, driver files and CUDA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmedge.machine.host import Host
from mmedge.machine.jetson import Jetson

__all__ = ["Cuda", "Gpu", "read_cuda", "read_gpus", "undriven_gpus"]

_QUERY = "index,name,compute_cap,memory.total,memory.free"
_MIB = 1 << 20
_NVIDIA = "0x10de"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: Such as "NVIDIA GeForce RTX 4070".
        compute_capability: Such as "8.9", "" if unknown.
        memory_bytes: Its own memory; None if shared with the machine, or unknown.
        free_bytes: Of it, None likewise.
        integrated: Whether it shares the machine's memory.
    """

    name: str
    compute_capability: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    integrated: bool = False


@dataclass(frozen=True, slots=True)
class Cuda:
    """Driver and CUDA versions.

    Attributes:
        driver: Version of the driver, such as "580.65.06"; "" where there is none.
        serves: The newest CUDA that the driver serves, such as "13.0"; "" if unknown.
        toolkit: Version of the CUDA toolkit under /usr/local/cuda, "" if there is none.
        bindings: Version of the Python package cuda-bindings, "" if it is not installed.
        fault: Why CUDA does not start from Python, "" if it does or was not asked.
    """

    driver: str
    serves: str
    toolkit: str
    bindings: str
    fault: str


def read_gpus(host: Host, jetson: Jetson | None, probed: Mapping[str, object]) -> tuple[Gpu, ...]:
    """Return the GPUs, in CUDA's order if known.

    Args:
        host: The machine.
        jetson: What it is, if it is one.
        probed: CUDA's description, see Host.probe; empty if not probed.
    """
    devices = probed.get("devices")
    if isinstance(devices, list) and devices:
        return tuple(_probed(device) for device in devices)
    if jetson is not None:
        # nvidia-smi on a Jetson reports neither compute capability nor memory.
        name = f"{jetson.family} (integrated)" if jetson.family else "integrated"
        return (Gpu(name, jetson.compute_capability, integrated=True),)
    output = host.run(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"])
    if output is not None:
        return tuple(gpu for line in output.splitlines() if (gpu := _from_line(line)) is not None)
    infos = host.matching("proc/driver/nvidia/gpus/*/information")
    names = (re.search(r"^Model:\s*(.+)$", _read(host, path), re.MULTILINE) for path in infos)
    return tuple(Gpu(match[1].strip(), "") for match in names if match is not None)


def read_cuda(host: Host, jetson: Jetson | None, probed: Mapping[str, object]) -> Cuda:
    """Return driver and CUDA versions.

    Args:
        host: The machine.
        jetson: What it is, if it is one.
        probed: CUDA's description, see Host.probe; empty if not probed.
    """
    version = re.search(
        r"Kernel Module(?:\s+for\s+\S+)?\s+([\d.]+)", host.text("proc/driver/nvidia/version")
    )
    output = ""
    if jetson is None:
        output = host.run(["nvidia-smi"]) or ""
    driver = re.search(r"Driver Version:\s*([\d.]+)", output) or version
    serves = re.search(r"CUDA Version:\s*([\d.]+)", output)
    toolkit = re.search(
        r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([\d.]+)"', host.text("usr/local/cuda/version.json")
    )
    return Cuda(
        driver=driver[1] if driver else "",
        serves=str(probed.get("driver") or "") or (serves[1] if serves else ""),
        toolkit=toolkit[1] if toolkit else "",
        bindings=host.package("cuda-bindings") or "",
        fault=str(probed.get("fault") or ""),
    )


def undriven_gpus(host: Host) -> int:
    """Return the number of NVIDIA GPUs on the PCI bus, with or without a driver."""
    count = 0
    for folder in host.matching("sys/bus/pci/devices/*"):
        name = folder.relative_to(host.root).as_posix()
        if host.text(f"{name}/vendor") == _NVIDIA and host.text(f"{name}/class").startswith("0x03"):
            count += 1
    return count


def _read(host: Host, path: object) -> str:
    return host.text(str(path)[len(str(host.root)) :].lstrip("/"))


def _probed(device: Mapping[str, object]) -> Gpu:
    memory, free = device.get("memory_bytes"), device.get("free_bytes")
    return Gpu(
        name=str(device.get("name")),
        compute_capability=str(device.get("compute_capability")),
        memory_bytes=memory if isinstance(memory, int) else None,
        free_bytes=free if isinstance(free, int) else None,
        integrated=bool(device.get("integrated")),
    )


def _from_line(line: str) -> Gpu | None:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_QUERY.split(",")):
        return None
    _, name, capability, total, free = cells
    return Gpu(
        name=name,
        compute_capability=capability if re.fullmatch(r"\d+\.\d", capability) else "",
        memory_bytes=int(total) * _MIB if total.isdecimal() else None,
        free_bytes=int(free) * _MIB if free.isdecimal() else None,
    )
